//! The moment that is verified: named by somebody, or drawn by chance from a branch's window.

use varve_api::Code;
use varve_api::verification::NewVerification;
use varve_postgres::Lsn;
use varve_storage::ids::{BranchName, TenantId, TimelineId};
use varve_storage::tenant_log::{TenantLog, VerifiedMoment};

use crate::Control;
use crate::error::Error;
use crate::moment;
use crate::ports::{Moment, Pageserver};

/// How often a moment is drawn of a window that moves on meanwhile.
const DRAWS_MAX: u64 = 8;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// This one.
    Named(Moment),
    /// Any one: drawn from this number, or by chance.
    Drawn(Option<u64>),
}

impl Asked {
    pub(super) fn parse(new: &NewVerification) -> Result<Asked, Error> {
        let named = new.lsn.is_some() || new.at.is_some();
        if named && new.seed.is_some() {
            return Err(Error::argument("seed", "both a moment and a number to draw one from were given: give one of them"));
        }
        let moment = moment::parse(new.lsn.as_deref(), new.at.as_deref())?;
        Ok(if named { Asked::Named(moment) } else { Asked::Drawn(new.seed) })
    }
}

/// A position of `from..=to`, each as likely as the others, that `seed` alone decides (splitmix64).
fn drawn(seed: u64, from: Lsn, to: Lsn) -> Lsn {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let span = u128::from(to.0.saturating_sub(from.0)) + 1;
    Lsn(from.0 + ((u128::from(z) * span) >> 64) as u64)
}

impl<P: Pageserver> Control<P> {
    /// The moment to verify of a branch.
    pub(super) async fn moment_to_verify(
        &self,
        id: TenantId,
        log: &TenantLog,
        (branch, timeline): (&BranchName, TimelineId),
        asked: Asked,
    ) -> Result<VerifiedMoment, Error> {
        let (at, seed) = match asked {
            Asked::Named(moment) => (self.resolve(id, timeline, moment).await?, None),
            Asked::Drawn(seed) => {
                let first = match seed {
                    Some(seed) => seed,
                    None => u64::from_be_bytes(self.environment.random()?),
                };
                let mut tries = 0;
                loop {
                    let head = self.resolve(id, timeline, Moment::Head).await?.lsn;
                    let earliest = log.state().earliest(timeline)?;
                    let seed = first.wrapping_add(tries);
                    match self.resolve(id, timeline, Moment::Lsn(drawn(seed, earliest, head))).await {
                        Ok(at) => break (at, Some(seed)),
                        // What is rounded down may lie before the window, whose begin moves on, too.
                        Err(error) if error.code() == Code::NotRetained && tries + 1 < DRAWS_MAX => tries += 1,
                        Err(error) => return Err(error),
                    }
                }
            }
        };
        let time = self.pageserver.time_at(id, at).await?.map(|time| time.0);
        Ok(VerifiedMoment { branch: branch.clone(), timeline: at.timeline, lsn: at.lsn, time, seed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_gives_one_moment_and_numbers_give_all_of_the_window() {
        let (from, to) = (Lsn(100), Lsn(109));
        let mut seen = [0; 10];
        for seed in 0..1000 {
            let at = drawn(seed, from, to);
            assert_eq!(at, drawn(seed, from, to));
            seen[(at.0 - from.0) as usize] += 1;
        }
        assert!(seen.iter().all(|count| (50..=150).contains(count)), "{seen:?}");
        assert_eq!(drawn(7, from, from), from);
        assert_eq!(drawn(7, Lsn(5), Lsn(4)), Lsn(5), "a window of nothing");
        assert!(drawn(u64::MAX, Lsn(0), Lsn::MAX) <= Lsn::MAX);
    }

    #[test]
    fn a_moment_is_named_or_drawn() {
        let new = |lsn: Option<&str>, at: Option<&str>, seed| NewVerification {
            branch: None,
            lsn: lsn.map(str::to_owned),
            at: at.map(str::to_owned),
            seed,
        };
        assert_eq!(Asked::parse(&new(None, None, None)).unwrap(), Asked::Drawn(None));
        assert_eq!(Asked::parse(&new(None, None, Some(4))).unwrap(), Asked::Drawn(Some(4)));
        assert_eq!(Asked::parse(&new(Some("0/8"), None, None)).unwrap(), Asked::Named(Moment::Lsn(Lsn(8))));
        for bad in [new(Some("0/8"), None, Some(1)), new(Some("0/8"), Some("2000-01-01T00:00:00Z"), None), new(Some("x"), None, None)] {
            assert!(matches!(Asked::parse(&bad), Err(Error::Argument { .. })), "{bad:?}");
        }
    }
}
