//! A queue in which tenants take turns.
//!
//! What waits stands in a line of its tenant; a place that becomes free goes to the tenant whose turn it is, however
//! long the others' lines are. No tenant has more than half of the places (but at least one), so that one whose work
//! hangs leaves room for the others. The queue does not run anything.

use std::collections::{HashMap, VecDeque};

use varve_storage::ids::TenantId;

/// See the module's doc.
#[derive(Debug)]
pub struct FairQueue<T> {
    /// What waits, by tenant; no line is empty.
    lines: HashMap<TenantId, VecDeque<T>>,
    /// Tenants with a line, in the order of their turns.
    turns: VecDeque<TenantId>,
    /// What runs, by tenant.
    running: HashMap<TenantId, usize>,
    running_count: usize,
}

impl<T> Default for FairQueue<T> {
    fn default() -> FairQueue<T> {
        FairQueue { lines: HashMap::new(), turns: VecDeque::new(), running: HashMap::new(), running_count: 0 }
    }
}

impl<T> FairQueue<T> {
    /// Puts `item` at the end of its tenant's line.
    pub fn push(&mut self, tenant: TenantId, item: T) {
        let line = self.lines.entry(tenant).or_default();
        if line.is_empty() {
            self.turns.push_back(tenant);
        }
        line.push_back(item);
    }

    /// The next that may run where there are `places`; it counts as running until [`FairQueue::ended`].
    pub fn pop(&mut self, places: usize) -> Option<(TenantId, T)> {
        if self.running_count >= places {
            return None;
        }
        let of_tenant_max = (places / 2).max(1);
        for _ in 0..self.turns.len() {
            let tenant = self.turns.pop_front()?;
            if self.running_of(tenant) >= of_tenant_max {
                self.turns.push_back(tenant);
                continue;
            }
            let line = self.lines.get_mut(&tenant)?;
            let item = line.pop_front()?;
            if line.is_empty() {
                self.lines.remove(&tenant);
            } else {
                self.turns.push_back(tenant);
            }
            *self.running.entry(tenant).or_default() += 1;
            self.running_count += 1;
            return Some((tenant, item));
        }
        None
    }

    /// Something of `tenant` does not run any more.
    pub fn ended(&mut self, tenant: TenantId) {
        if let Some(count) = self.running.get_mut(&tenant) {
            *count -= 1;
            self.running_count -= 1;
            if *count == 0 {
                self.running.remove(&tenant);
            }
        }
    }

    /// Takes what `is_it` out of a tenant's line.
    pub fn remove(&mut self, tenant: TenantId, is_it: impl Fn(&T) -> bool) {
        if let Some(line) = self.lines.get_mut(&tenant) {
            line.retain(|item| !is_it(item));
            if line.is_empty() {
                self.lines.remove(&tenant);
                self.turns.retain(|other| *other != tenant);
            }
        }
    }

    /// How many of a tenant run.
    pub fn running_of(&self, tenant: TenantId) -> usize {
        self.running.get(&tenant).copied().unwrap_or(0)
    }

    /// How many run.
    pub fn running_count(&self) -> usize {
        self.running_count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(number: u8) -> TenantId {
        TenantId([number; 16])
    }

    #[test]
    fn tenants_take_turns_and_none_takes_all_places() {
        let mut queue = FairQueue::default();
        for item in 0..100 {
            queue.push(tenant(1), item);
        }
        queue.push(tenant(2), 1000);
        let first: Vec<_> = std::iter::from_fn(|| queue.pop(4)).collect();
        assert_eq!(first, [(tenant(1), 0), (tenant(2), 1000), (tenant(1), 1)], "the fourth place is left for others");
        queue.push(tenant(3), 2000);
        assert_eq!(queue.pop(4), Some((tenant(3), 2000)));
        assert_eq!(queue.pop(4), None, "all places are taken");
        queue.ended(tenant(2));
        assert_eq!(queue.pop(4), None, "tenant 1 has its half");
        queue.ended(tenant(1));
        assert_eq!(queue.pop(4), Some((tenant(1), 2)));
        queue.remove(tenant(1), |_| true);
        queue.ended(tenant(1));
        assert_eq!(queue.pop(4), None);
        assert_eq!((queue.running_count(), queue.running_of(tenant(1))), (2, 1));
    }
}
