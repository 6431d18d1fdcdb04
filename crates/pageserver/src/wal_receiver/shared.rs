//! What the receiver's thread and its owner share: how to stop, and how far it is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use varve_postgres::Lsn;
use varve_protocol::connect::SocketCloser;

/// How far a receiver is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReceiverPositions {
    /// End of the bytes that came.
    pub received: Lsn,
    /// End of the last whole record that came.
    pub framed: Lsn,
    /// What the sink said is durable.
    pub durable: Lsn,
    /// Acknowledged as written and flushed: the lesser of the last two.
    pub flushed: Lsn,
    /// Acknowledged as applied: in the store.
    pub applied: Lsn,
    /// WAL before this the primary need not keep.
    pub not_needed_before: Lsn,
}

/// What a receiver is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReceiverPhase {
    /// It connects, again and again if need be.
    #[default]
    Connecting,
    /// It is connected, but the server does not wait for this standby yet.
    WaitingForStandbyName,
    /// WAL comes and is acknowledged.
    Streaming,
    /// It has ended.
    Ended,
}

#[derive(Default)]
struct State {
    positions: ReceiverPositions,
    phase: ReceiverPhase,
    trouble: Option<String>,
    /// Why what came last could not be kept, until something is kept again.
    not_kept: Option<String>,
    closer: Option<SocketCloser>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Shared {
    stopped: AtomicBool,
    /// Held while something is sent to the server. To stop takes it, too: so what is being sent has gone (or failed)
    /// when stopping returns, and nothing goes afterwards.
    gate: Mutex<()>,
    state: Mutex<State>,
    /// Positions or phase. Not for those who only sleep: a wake-up for each acknowledgement would cost more than the
    /// acknowledgement.
    changed: Condvar,
    stopping: Condvar,
}

/// The receiver was told to stop.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stopped;

impl Shared {
    pub(super) fn new(positions: ReceiverPositions) -> Shared {
        Shared { state: Mutex::new(State { positions, ..State::default() }), ..Shared::default() }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Nothing is sent to the server once this has returned.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        // First break the connection, so that a write that waits for a frozen server fails and gives the gate free.
        if let Some(closer) = &self.state.lock().closer {
            closer.close();
        }
        drop(self.gate.lock());
        self.stopping.notify_all();
    }

    /// Sends, unless stopped.
    pub(super) fn send<T>(&self, send: impl FnOnce() -> T) -> Result<T, Stopped> {
        let _gate = self.gate.lock();
        if self.is_stopped() { Err(Stopped) } else { Ok(send()) }
    }

    /// The connection that is to be broken when the receiver is stopped.
    pub(super) fn set_closer(&self, closer: SocketCloser) {
        let mut state = self.state.lock();
        // Stopping sets the flag before it looks for a connection: one of the two sees the other.
        if self.is_stopped() {
            closer.close();
        }
        state.closer = Some(closer);
    }

    /// The connection is no more. (A closer keeps its socket open.)
    pub(super) fn clear_closer(&self) {
        self.state.lock().closer = None;
    }

    pub(super) fn positions(&self) -> ReceiverPositions {
        self.state.lock().positions
    }

    pub(super) fn phase(&self) -> ReceiverPhase {
        self.state.lock().phase
    }

    pub(super) fn trouble(&self) -> Option<String> {
        let state = self.state.lock();
        state.not_kept.clone().or_else(|| state.trouble.clone())
    }

    /// Why what came last could not be kept.
    pub(super) fn not_kept(&self) -> Option<String> {
        self.state.lock().not_kept.clone()
    }

    /// Remembers why what came could not be kept, or that it can be again; whether that is news.
    pub(super) fn set_not_kept(&self, why: Option<&str>) -> bool {
        let mut state = self.state.lock();
        let news = state.not_kept.as_deref() != why;
        if news {
            state.not_kept = why.map(str::to_owned);
        }
        news
    }

    pub(super) fn set_positions(&self, positions: ReceiverPositions) {
        self.state.lock().positions = positions;
        self.changed.notify_all();
    }

    pub(super) fn set_phase(&self, phase: ReceiverPhase) {
        let mut state = self.state.lock();
        state.phase = phase;
        if phase == ReceiverPhase::Streaming {
            state.trouble = None;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Remembers why there is no stream; whether that is news.
    pub(super) fn set_trouble(&self, trouble: &str) -> bool {
        let mut state = self.state.lock();
        let news = state.trouble.as_deref() != Some(trouble);
        state.trouble = Some(trouble.to_owned());
        news
    }

    /// Waits for `time`, or until stopped.
    pub(super) fn pause(&self, time: Duration) -> Result<(), Stopped> {
        let deadline = Instant::now() + time;
        let mut state = self.state.lock();
        while !self.is_stopped() && !self.stopping.wait_until(&mut state, deadline).timed_out() {}
        if self.is_stopped() { Err(Stopped) } else { Ok(()) }
    }

    /// Waits until `reached`, the receiver's end, or `deadline`; whether it was reached.
    pub(super) fn wait(&self, deadline: Instant, mut reached: impl FnMut(&ReceiverPositions, ReceiverPhase) -> bool) -> bool {
        let mut state = self.state.lock();
        loop {
            if reached(&state.positions, state.phase) {
                return true;
            }
            if state.phase == ReceiverPhase::Ended || self.changed.wait_until(&mut state, deadline).timed_out() {
                return reached(&state.positions, state.phase);
            }
        }
    }
}
