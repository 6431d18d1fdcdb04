//! What happened in a run, in order: hashed always, so that two runs can be compared, and printed if somebody wants to
//! read it.

use std::fmt;

use parking_lot::Mutex;

/// See the module's doc.
#[derive(Debug)]
pub struct Trace {
    inner: Mutex<Inner>,
    prints: bool,
}

#[derive(Debug)]
struct Inner {
    hash: u64,
    events: u64,
    began: tokio::time::Instant,
    last: std::collections::VecDeque<String>,
}

/// Events that a failure shows.
const LAST_MAX: usize = 40;

impl Trace {
    /// An empty trace, which begins now.
    pub fn new(prints: bool) -> Trace {
        let inner = Inner { hash: 0xCBF2_9CE4_8422_2325, events: 0, began: tokio::time::Instant::now(), last: Default::default() };
        Trace { inner: Mutex::new(inner), prints }
    }

    /// Adds an event.
    pub fn say(&self, what: fmt::Arguments<'_>) {
        let mut inner = self.inner.lock();
        let line = format!("{:>11.6} {what}", inner.began.elapsed().as_secs_f64());
        for byte in line.bytes() {
            // FNV-1a: the same in every build.
            inner.hash = (inner.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
        }
        inner.events += 1;
        if self.prints {
            println!("{line}");
        }
        if inner.last.len() == LAST_MAX {
            inner.last.pop_front();
        }
        inner.last.push_back(line);
    }

    /// Number and hash of all events.
    pub fn sum(&self) -> (u64, u64) {
        let inner = self.inner.lock();
        (inner.events, inner.hash)
    }

    /// The last events, a line each.
    pub fn last(&self) -> String {
        self.inner.lock().last.iter().map(|line| format!("{line}\n")).collect()
    }
}
