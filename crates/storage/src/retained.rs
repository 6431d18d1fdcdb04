//! Which moments of a timeline's own history must stay readable.
//!
//! Everything from the **cutoff** to the **top**, and besides that single positions, the **pins**: where branches left
//! it, what snapshots and leases name, what computes were started from. Collection keeps the state at each of these
//! and nothing else. All of it is derived from the tenant's log, whose order decides between a collection and a branch:
//! a cutoff only grows, and a new pin is at or above it or where a pin is already.

use serde::{Deserialize, Serialize};
use varve_postgres::Lsn;

/// See the module's doc.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retained {
    /// Everything from here to the top is retained.
    #[serde(with = "crate::row_fields::lsn")]
    pub cutoff: Lsn,
    /// The end of what is retained; [`Lsn::MAX`] where a branch goes on with it.
    #[serde(with = "crate::row_fields::lsn")]
    pub top: Lsn,
    /// Positions that are retained besides, ascending, none twice.
    #[serde(with = "crate::row_fields::lsns")]
    pins: Vec<Lsn>,
}

impl Default for Retained {
    /// Everything.
    fn default() -> Retained {
        Retained { cutoff: Lsn::INVALID, top: Lsn::MAX, pins: Vec::new() }
    }
}

impl Retained {
    /// What is retained from `cutoff` to `top`, and at `pins`, in any order.
    pub fn new(cutoff: Lsn, top: Lsn, mut pins: Vec<Lsn>) -> Retained {
        pins.sort_unstable();
        pins.dedup();
        Retained { cutoff, top, pins }
    }

    /// The pins, ascending.
    pub fn pins(&self) -> &[Lsn] {
        &self.pins
    }

    /// Whether the history must be readable at `lsn`.
    pub fn holds(&self, lsn: Lsn) -> bool {
        self.cutoff <= lsn && lsn <= self.top || self.pins.binary_search(&lsn).is_ok()
    }

    /// The same with another cutoff.
    pub fn from(&self, cutoff: Lsn) -> Retained {
        Retained { cutoff, ..self.clone() }
    }

    /// The same up to `top` only.
    pub fn up_to(&self, top: Lsn) -> Retained {
        Retained { top, ..self.clone() }
    }

    /// Which positions up to `cut` a collection up to there keeps, ascending: the pins, and `cut` itself where anything
    /// above it rests on it. Versions that none of them shows are garbage.
    pub fn points_upto(&self, cut: Lsn) -> Vec<Lsn> {
        let pins = self.pins.iter().copied().take_while(|pin| *pin < cut);
        pins.chain((cut <= self.top).then_some(cut)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_and_pins_are_held() {
        let retained = Retained::new(Lsn(100), Lsn::MAX, vec![Lsn(50), Lsn(20), Lsn(50), Lsn(120)]);
        for (lsn, held) in [(19, false), (20, true), (21, false), (50, true), (99, false), (100, true), (u64::MAX, true)] {
            assert_eq!(retained.holds(Lsn(lsn)), held, "{lsn}");
        }
        assert_eq!(retained.points_upto(Lsn(100)), [Lsn(20), Lsn(50), Lsn(100)]);
        assert_eq!(retained.points_upto(Lsn(40)), [Lsn(20), Lsn(40)]);
    }

    #[test]
    fn above_the_top_nothing_is_held() {
        let nameless = Retained::new(Lsn(100), Lsn::MAX, vec![Lsn(50), Lsn(110)]).up_to(Lsn(110));
        assert!(nameless.holds(Lsn(105)) && nameless.holds(Lsn(110)) && !nameless.holds(Lsn(111)));
        let pins_only = Retained::new(Lsn(200), Lsn(110), vec![Lsn(50), Lsn(110)]);
        assert!(pins_only.holds(Lsn(50)) && pins_only.holds(Lsn(110)) && !pins_only.holds(Lsn(100)) && !pins_only.holds(Lsn(200)));
        assert_eq!(pins_only.points_upto(Lsn(200)), [Lsn(50), Lsn(110)]);
    }
}
