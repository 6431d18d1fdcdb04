//! What can happen in a run, counted: over a run of seeds each kind must have come about, or the run has shown nothing.

use std::collections::BTreeMap;

use parking_lot::Mutex;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// A kind of fault, or a thing that a fault must have led to.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind { $($(#[$doc])* $name),+ }

        impl Kind {
            /// All of them.
            pub const ALL: &[Kind] = &[$(Kind::$name),+];
        }
    };
}

kinds! {
    /// A pageserver's process ended; its disk's cache stayed.
    ProcessCrashed,
    /// A pageserver's machine lost power.
    PowerCut,
    /// A pageserver came back with an empty disk.
    DiskLost,
    /// An fsync of the WAL log failed.
    SyncFailed,
    /// Another pageserver took the tenant over.
    TookOver,
    /// A pageserver's way to the store hung.
    StoreHung,
    /// A request to the store failed and had no effect.
    StoreSaidNo,
    /// A request to the store failed and had its effect.
    StoreSaidNoToWhatItDid,
    /// A put failed and had its effect much later.
    StoreDidItLate,
    /// A pageserver's clock jumped.
    ServerClockJumped,
    /// A compute's wall clock jumped, back too.
    WallClockJumped,
    /// A compute's Postgres was killed; its process began anew.
    ComputeKilled,
    /// A pageserver ended while a restore was under way.
    CrashInRestore,
    /// A pageserver ended while a branch was made.
    CrashInBranch,
    /// A pageserver ended while a branch was deleted.
    CrashInDelete,
    /// A pageserver ended while a compute began.
    CrashInBegin,
    /// A pageserver ended while a compute attached.
    CrashInAttach,
    /// A pageserver ended, and its control plane with it, while a compute's end was told and its epoch closed.
    CrashInStop,
    /// A control plane ended while somebody waited for a compute's start.
    CrashInStart,
    /// A control plane ended while somebody waited for a compute's stop.
    CrashInStopCall,
    /// A pageserver ended while it took the tenant over.
    CrashInTakeOver,
    /// A host's process ended; its computes went on.
    HostCrashed,
    /// A host's process was away for longer than it counts as there.
    HostAway,
    /// A host's messages, and those of its computes, were slow.
    HostSlow,
    /// A host's report, or the answer to it, was lost.
    ReportLost,
    /// Another message to the control plane, or its answer, was lost.
    MessageLost,
    /// A compute process was killed, and its Postgres with it.
    ProcessKilled,
    /// The control plane refused a compute.
    RefusedCompute,
    /// A fenced compute was refused: a later epoch writes.
    RefusedEpoch,
    /// A compute was refused: its branch points elsewhere.
    RefusedBranch,
    /// A stream was ended while its compute was writing.
    StreamEnded,
    /// Somebody had to wait for the compute that alone had the newest WAL.
    TailWasUnknown,
    /// A compute sent again what a lost disk had held.
    TailSentAgain,
    /// What a lost disk may have had was given up, as the error message says.
    TailGivenUp,
    /// A change was written, or not: its caller could not learn it.
    Unconfirmed,
    /// A pageserver learnt that it had lost the tenant.
    LostTenant,
    /// A record was voided: its epoch had ended before it arrived.
    RecordVoided,
    /// A restore to a time.
    RestoredToTime,
    /// A restore to a position.
    RestoredToPosition,
    /// An idle timeline was closed.
    IdleClosed,
    /// Layers were reduced to what is retained.
    Collected,
    /// A position was asked for that is not retained any more.
    NotRetained,
    /// WAL went to the store before layers had it.
    ShippedWal,
    /// WAL of a server whose disk was lost, or that has lost the tenant, was found in the store.
    FoundShippedWal,
    /// The WAL log was over its limit while a compute wrote.
    WalLogFull,
}

/// How often each kind came about.
#[derive(Debug, Default)]
pub struct Counts {
    counts: Mutex<BTreeMap<Kind, u64>>,
}

impl Counts {
    /// Counts one.
    pub fn add(&self, kind: Kind) {
        self.add_all(kind, 1);
    }

    /// Counts some.
    pub fn add_all(&self, kind: Kind, count: u64) {
        if count > 0 {
            *self.counts.lock().entry(kind).or_default() += count;
        }
    }

    /// Takes those of another run in.
    pub fn merge(&self, other: &Counts) {
        for (kind, count) in other.counts.lock().iter() {
            self.add_all(*kind, *count);
        }
    }

    /// How often.
    pub fn get(&self, kind: Kind) -> u64 {
        self.counts.lock().get(&kind).copied().unwrap_or(0)
    }

    /// Those that never came about.
    pub fn missing(&self) -> Vec<Kind> {
        Kind::ALL.iter().copied().filter(|kind| self.get(*kind) == 0).collect()
    }
}
