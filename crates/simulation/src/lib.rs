//! The simulation: servers, computes, branches and misfortune under one seed.
//!
//! A run is one world ([`world::World`]) in one tokio runtime with paused time:
//!
//! - an object store, and two machines, each with a server ([`node::Node`]): the real engine, and the real control
//!   plane over it ([`door::control`]), which dies with it;
//! - two hosts ([`host::Host`]) that poll the control plane for orders and report, and compute processes on them
//!   ([`process::Process`]) that begin, attach and follow orders; each runs a Postgres ([`compute::Compute`]) that
//!   writes real WAL and waits for acknowledgements;
//! - people who branch, restore, delete, start, stop and read ([`actors::person`]; what they ask of the control plane
//!   is [`steward`]), and misfortune ([`actors::misfortune`]).
//!
//! All of them know one address, which leads to the server that should have the tenant; messages are late or lost
//! ([`network`]). A seed decides everything, so a run can be had again: [`run::run`]. Afterwards the faults end, and
//! everything must come to rest and be served ([`rest`]).
//!
//! **How it stays one schedule.** Nothing runs beside the runtime. Blocking work runs on threads of which one at a time
//! has the baton ([`threads`]). Random bytes come from a seeded source ([`varve_storage::chance`]), time is tokio's,
//! the WAL log's disk is a [`varve_testing::sim_disk::SimDisk`], the store a [`varve_testing::sim_store::SimStore`].
//! Two runs of a seed have the same trace, hashed ([`trace`]).
//!
//! **What is checked.** The [`ledger::Ledger`] knows every record that a compute wrote and which were acknowledged:
//!
//! - an acknowledged commit is in every history that must have it, and no epoch begins below it;
//! - what a fenced compute wrote is in none, and it gets nothing acknowledged;
//! - a read equals a naive history that the same records were put into; a moment is the boundary that a walk over all
//!   records finds;
//! - a branch's compute gets nothing acknowledged on a timeline that the branch has left;
//! - nothing that lives is missing in the store; no server stops or refuses for a reason that no fault explains;
//! - when faults end, every branch gets a compute on its own timeline and commits, every timeline reads as written.
//!
//! **What must come about.** Each kind of fault, and what faults must lead to, is counted ([`kinds`]); over a run of
//! seeds a kind that never came about fails it.
//!
//! **What is a model.** Hosts ([`host`]) and compute processes ([`process`]): the same calls in the same order as in
//! `varve_host`; Postgres ([`compute`]); the WAL receiver, and which tenants a server owns ([`node`]). What these get
//! wrong in the real thing is not found here; faults of order that are planted in them are ([`world::Plant`]).
//!
//! **When a seed fails**: `scripts/simulate --seed S` prints what happens in it; `RUST_LOG=debug` adds what the engine
//! says at each point. A run that stands still says which threads wait: then a lock is held across I/O.

pub mod actors;
pub mod compute;
pub mod door;
pub mod host;
pub mod judge;
pub mod kinds;
pub mod ledger;
pub mod many;
pub mod network;
pub mod node;
pub mod process;
pub mod rest;
pub mod run;
pub mod steward;
pub mod template;
pub mod threads;
pub mod trace;
pub mod wal;
pub mod world;
