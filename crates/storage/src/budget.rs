//! A budget of memory that many share: who allocates adds, who frees takes away, and whoever feeds them looks whether
//! it is used up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes in use, and how many should be at most. Going over is possible; it is for the users of the budget to slow
/// down.
#[derive(Debug)]
pub struct MemoryBudget {
    used_bytes: AtomicUsize,
    limit_bytes: usize,
}

impl MemoryBudget {
    /// A budget of `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Arc<MemoryBudget> {
        Arc::new(MemoryBudget { used_bytes: AtomicUsize::new(0), limit_bytes })
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> usize {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that should be in use at most.
    pub fn limit_bytes(&self) -> usize {
        self.limit_bytes
    }

    /// Whether more is in use than should be.
    pub fn is_over(&self) -> bool {
        self.used_bytes() > self.limit_bytes
    }
}

/// One user's part of a budget, given back when dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<MemoryBudget>,
    bytes: AtomicUsize,
}

impl Share {
    /// An empty part of `budget`.
    pub fn new(budget: Arc<MemoryBudget>) -> Share {
        Share { budget, bytes: AtomicUsize::new(0) }
    }

    /// Takes `bytes` more.
    pub fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.budget.used_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes taken.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.used_bytes.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_given_back() {
        let budget = MemoryBudget::new(100);
        let (a, b) = (Share::new(Arc::clone(&budget)), Share::new(Arc::clone(&budget)));
        a.add(60);
        b.add(30);
        b.add(20);
        assert_eq!((a.bytes(), b.bytes(), budget.used_bytes(), budget.is_over()), (60, 50, 110, true));
        drop(a);
        assert_eq!((budget.used_bytes(), budget.is_over()), (50, false));
    }
}
