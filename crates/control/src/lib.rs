//! The control plane: tenants, branches, endpoints and their computes, hosts, and the admin API.
//!
//! Start from [`Control`]; [`http`] is its door for people and programs, [`ports::Pageserver`] its door to the engine,
//! [`Environment`] all that it takes from the world.
//!
//! **What it promises.** What is desired stands in the tenants' logs in the store, nowhere else: after a restart
//! nothing is forgotten. Each mutation is one commit there, so it is done or not. A compute belongs to a branch: it is
//! the branch's *endpoint*, with an id that stays, and which timeline it serves is looked up by the branch's name
//! whenever it begins or attaches. Lists and descriptions take no tenant over. A compute's folder is ordered away only
//! when nothing can be lost with it.
//!
//! **What it must not know.** Pages, WAL, layers, sockets of Postgres, processes, files, devices, other machines'
//! paths.

pub mod arguments;
mod branches;
mod call;
mod computes;
mod control;
mod environment;
mod error;
mod events;
mod history;
mod hosts;
pub mod http;
mod leftovers;
mod logs;
mod moment;
mod pages;
mod password;
pub mod ports;
mod processes;
mod registry;
mod settings;
mod sizes;
mod start;
mod templates;
mod tenants;
mod verification;
mod watched;

pub use call::{Call, Key};
pub use control::{Config, Control};
pub use environment::{Environment, NoRandom, Surroundings};
pub use error::{Error, RequestError};
pub use start::Started;
pub use verification::VerifyConfig;
