//! Which runs of layers to merge, so that a read has few to search, whatever was written.
//!
//! Runs are merged with their neighbours in LSN when there are enough of about the same size: the newest [`WIDTH_MIN`]
//! or more, each at most half as large again as all newer ones in the merge together. Four flushes become one run, four
//! of those the next: what a version costs to be moved, and how many runs there are, both grow with the logarithm of
//! the history, as sizes grow geometrically where nothing is merged.
//!
//! A merge publishes its layers one after the other, in order of keys, and takes an input away when all its keys are
//! passed. So a merge that was interrupted shows in the layer map: a run whose LSN range holds those of others. It is
//! gone on with, behind its last key.
//!
//! An ordinary merge drops nothing. **Collection** does: it takes the oldest run, the *base*, together with all history
//! that lies before the tenant's cutoff, and leaves of both what is retained ([`crate::retained`]). What of the newest
//! run in it lies behind the cutoff becomes a run of its own again, so that afterwards the base ends at the cutoff. It
//! is done when a fair part of what has to be written again is expected to go ([`GARBAGE_SHARE`]), so a byte of history
//! costs a constant number of moves however large the base is. Ordinary merges leave the base alone.

use std::ops::Range;

use varve_postgres::Lsn;

use crate::key::Key;
use crate::layer_map::Run;
use crate::retained::Retained;

/// Runs that are worth a merge.
pub const WIDTH_MIN: usize = 4;
/// Runs in one merge at most: each costs a read-ahead buffer.
pub const WIDTH_MAX: usize = 16;

/// Part of the bytes of a collection that must be expected to go: one in so many.
const GARBAGE_SHARE: u64 = 4;

/// A merge to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MergePlan {
    /// Numbers of the runs to be merged, in the layer map's order, newest first.
    pub inputs: Vec<usize>,
    /// LSN range of what comes out.
    pub range: (Lsn, Lsn),
    /// Keys up to this one are merged and published already.
    pub done_to: Option<Key>,
}

/// What is known of a run: its LSN range, bytes, last key, and whether it may be merged. A template's layers may not.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    start: Lsn,
    end: Lsn,
    bytes: u64,
    layers: usize,
    last_key: Key,
    is_own: bool,
}

fn candidates(runs: &[Run]) -> Vec<Candidate> {
    let candidate = |run: &Run| Candidate {
        start: run.lsn_start,
        end: run.lsn_end,
        bytes: run.bytes(),
        layers: run.layers().len(),
        last_key: run.layers().last().map_or(Key::MIN, |layer| layer.info().last_key),
        is_own: run.layers().iter().all(|layer| layer.is_own()),
    };
    runs.iter().map(candidate).collect()
}

/// Others' runs lie below all own ones.
fn own(runs: &[Candidate]) -> &[Candidate] {
    runs.split(|run| !run.is_own).next().unwrap_or_default()
}

/// The merge that is due among `runs`, which are all block runs or all metadata runs of a timeline, collected up to
/// `base_end`.
pub fn plan(runs: &[Run], base_end: Lsn) -> Option<MergePlan> {
    plan_candidates(&candidates(runs), base_end)
}

/// The rest of a merge that was interrupted, if there is one among `runs`.
pub fn plan_unfinished(runs: &[Run]) -> Option<MergePlan> {
    unfinished(own(&candidates(runs)))
}

fn plan_candidates(runs: &[Candidate], base_end: Lsn) -> Option<MergePlan> {
    let runs = own(runs);
    if let Some(plan) = unfinished(runs) {
        return Some(plan);
    }
    let runs = runs.split(|run| run.end <= base_end).next().unwrap_or_default();
    let merge = |from: usize, width: usize| MergePlan {
        inputs: (from..from + width).collect(),
        range: (runs[from + width - 1].start, runs[from].end),
        done_to: None,
    };
    (0..runs.len())
        .map(|from| (from, similar(&runs[from..])))
        .find(|(_, width)| *width >= WIDTH_MIN)
        .map(|(from, width)| merge(from, width))
}

/// How many of `runs`, from the first on, are of about the same size.
fn similar(runs: &[Candidate]) -> usize {
    let mut total = 0;
    let fits = |run: &&Candidate| {
        let fits = total == 0 || run.bytes <= total + total / 2;
        total += run.bytes;
        fits
    };
    runs.iter().take(WIDTH_MAX).take_while(fits).count()
}

/// What a collection takes of one kind of runs: the oldest own ones, newest first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CollectInputs {
    /// Their numbers in the layer map's order.
    pub inputs: Range<usize>,
    /// LSN range of all of them.
    pub range: (Lsn, Lsn),
    /// Number of their layers.
    pub layers: usize,
    /// Their bytes.
    bytes: u64,
    /// Those that are expected to go.
    garbage: u64,
}

/// What a collection up to `cut` takes of `runs`, which are all block runs or all metadata runs of a timeline; none if
/// there is nothing.
pub fn collect_inputs(runs: &[Run], cut: Lsn, retained: &Retained, collected: &Retained) -> Option<CollectInputs> {
    collect_candidates(&candidates(runs), cut, retained, collected)
}

fn collect_candidates(runs: &[Candidate], cut: Lsn, retained: &Retained, collected: &Retained) -> Option<CollectInputs> {
    let runs = own(runs);
    let first = runs.iter().position(|run| run.start < cut)?;
    let taken = &runs[first..];
    let garbage = |run: &Candidate| {
        if run.end <= collected.cutoff {
            // What it holds for pins that are not there any more.
            let gone = collected.pins().iter().filter(|pin| **pin < collected.cutoff && !retained.holds(**pin)).count() as u64;
            return run.bytes / (collected.pins().len() as u64 + 1) * gone;
        }
        let share = u128::from(run.end.min(cut).0 - run.start.0) * u128::from(run.bytes);
        (share / u128::from((run.end.0 - run.start.0).max(1))) as u64
    };
    Some(CollectInputs {
        inputs: first..runs.len(),
        range: (taken.iter().map(|run| run.start).min()?, taken.iter().map(|run| run.end).max()?),
        layers: taken.iter().map(|run| run.layers).sum(),
        bytes: taken.iter().map(|run| run.bytes).sum(),
        garbage: taken.iter().map(garbage).sum(),
    })
}

/// Whether a collection of these is worth its work, which must be expected to free `garbage_bytes_min` at least.
pub fn is_worth_it<'i>(inputs: impl Iterator<Item = &'i CollectInputs>, garbage_bytes_min: u64) -> bool {
    let (bytes, garbage) = inputs.fold((0, 0), |(bytes, garbage), inputs| (bytes + inputs.bytes, garbage + inputs.garbage));
    garbage > 0 && garbage >= garbage_bytes_min && garbage >= bytes / GARBAGE_SHARE
}

/// The rest of a merge that was interrupted.
fn unfinished(runs: &[Candidate]) -> Option<MergePlan> {
    for (i, merged) in runs.iter().enumerate() {
        let inside = |run: &Candidate| merged.start <= run.start && run.end <= merged.end;
        let inputs: Vec<usize> = (i + 1..runs.len()).filter(|other| inside(&runs[*other])).collect();
        if !inputs.is_empty() {
            return Some(MergePlan { inputs, range: (merged.start, merged.end), done_to: Some(merged.last_key) });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs of these sizes, newest first, ten bytes of WAL each.
    fn runs(bytes: &[u64]) -> Vec<Candidate> {
        let count = bytes.len() as u64;
        let run = |(i, bytes): (usize, &u64)| {
            let end = (count - i as u64) * 10;
            Candidate { start: Lsn(end - 10), end: Lsn(end), bytes: *bytes, layers: 1, last_key: Key::MAX, is_own: true }
        };
        bytes.iter().enumerate().map(run).collect()
    }

    fn inputs(bytes: &[u64]) -> Vec<usize> {
        plan_candidates(&runs(bytes), Lsn::INVALID).map(|plan| plan.inputs).unwrap_or_default()
    }

    #[test]
    fn neighbours_of_one_size_are_merged() {
        assert_eq!(inputs(&[10, 10, 10]), [0; 0]);
        assert_eq!(inputs(&[10, 10, 10, 10]), [0, 1, 2, 3]);
        assert_eq!(inputs(&[10, 11, 9, 10, 1000]), [0, 1, 2, 3]);
        assert_eq!(inputs(&[10, 40, 40, 40, 40]), [1, 2, 3, 4]);
        assert_eq!(inputs(&[10, 10, 10, 10, 40, 40]), [0, 1, 2, 3, 4, 5], "what is as large as all newer ones together joins them");
        assert_eq!(inputs(&[1, 10, 100, 1000, 10_000]), [0; 0], "each is much larger than the newer ones");
        assert_eq!(inputs(&[5; 40]).len(), WIDTH_MAX);
        let plan = plan_candidates(&runs(&[10, 10, 10, 10, 1000]), Lsn::INVALID).unwrap();
        assert_eq!(plan.range, (Lsn(10), Lsn(50)));
    }

    #[test]
    fn odd_sizes_do_not_make_many_runs() {
        // Flushes of between a byte and a gigabyte, in a random order.
        let (mut sizes, mut random) = (Vec::new(), 1u64);
        for _ in 0..2000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sizes.insert(0, 1 << ((random >> 33) % 31));
            while let Some(plan) = plan_candidates(&runs(&sizes), Lsn::INVALID) {
                let (from, width) = (plan.inputs[0], plan.inputs.len());
                let merged: u64 = sizes.drain(from..from + width).sum();
                sizes.insert(from, merged);
            }
            assert!(sizes.len() < 40, "{sizes:?}");
        }
    }

    #[test]
    fn an_interrupted_merge_is_gone_on_with() {
        let mut runs = runs(&[5, 10, 10, 10, 10]);
        let merged = Candidate { start: Lsn(0), end: Lsn(40), bytes: 7, layers: 1, last_key: Key::FIRST_METADATA, is_own: true };
        runs.insert(1, merged);
        let plan = plan_candidates(&runs, Lsn::INVALID).unwrap();
        assert_eq!(plan, MergePlan { inputs: vec![2, 3, 4, 5], range: (Lsn(0), Lsn(40)), done_to: Some(Key::FIRST_METADATA) });
    }

    #[test]
    fn what_belongs_to_others_is_left_alone() {
        let mut runs = runs(&[10, 10, 10, 10]);
        runs[3].is_own = false;
        assert_eq!(plan_candidates(&runs, Lsn::INVALID), None);
    }

    #[test]
    fn a_long_load_costs_few_moves_and_leaves_few_runs() {
        // One flush after the other, each merged as planned.
        let (mut sizes, mut moved) = (Vec::new(), 0);
        for flushed in 1..=4096u64 {
            sizes.insert(0, 1);
            while let Some(plan) = plan_candidates(&runs(&sizes), Lsn::INVALID) {
                let (from, width) = (plan.inputs[0], plan.inputs.len());
                let merged: u64 = sizes.drain(from..from + width).sum();
                sizes.insert(from, merged);
                moved += merged;
            }
            assert!(sizes.len() <= 20, "{} runs after {flushed} flushes", sizes.len());
        }
        assert!(moved / 4096 <= 8, "each flushed byte was moved {} times", moved / 4096);
    }

    #[test]
    fn the_base_is_left_to_collections() {
        let runs = runs(&[10, 10, 10, 10, 10]);
        let plan = plan_candidates(&runs, Lsn(10)).unwrap();
        assert_eq!(plan.inputs, [0, 1, 2, 3]);
        assert_eq!(plan_candidates(&runs, Lsn(20)), None);
    }

    #[test]
    fn a_collection_waits_until_a_fair_part_goes() {
        let (kib, window) = (1 << 10, |cutoff| Retained::new(Lsn(cutoff), Lsn::MAX, Vec::new()));
        // Five runs of ten bytes of WAL each; the oldest is the base, collected up to 10.
        let due = |sizes: &[u64], cut: u64| {
            let inputs = collect_candidates(&runs(sizes), Lsn(cut), &window(cut), &window(10));
            (inputs.as_ref().map(|inputs| inputs.inputs.clone()), is_worth_it(inputs.iter(), 64 * kib))
        };
        assert_eq!(due(&[100 * kib; 5], 10), (Some(4..5), false), "nothing is new below the cutoff");
        assert_eq!(due(&[100 * kib; 5], 20), (Some(3..5), true));
        assert_eq!(
            due(&[100 * kib, 100 * kib, 100 * kib, 100 * kib, 1000 * kib], 20),
            (Some(3..5), false),
            "too little of the base's size"
        );
        assert_eq!(due(&[100 * kib, 100 * kib, 100 * kib, 300 * kib, 1000 * kib], 20), (Some(3..5), false));
        assert_eq!(due(&[100 * kib, 100 * kib, 100 * kib, 400 * kib, 1000 * kib], 20), (Some(3..5), true));
        assert_eq!(due(&[100 * kib, 100 * kib, 100 * kib, 400 * kib, 1000 * kib], 15), (Some(3..5), false), "half of it is below");
        assert_eq!(due(&[kib; 5], 50), (Some(0..5), false), "too little at all");
        let pinned = Retained::new(Lsn(10), Lsn::MAX, vec![Lsn(5)]);
        let inputs = |retained| collect_candidates(&runs(&[100 * kib; 5]), Lsn(10), &retained, &pinned);
        assert!(!is_worth_it(inputs(pinned.clone()).iter(), kib), "the pin is still there");
        assert!(is_worth_it(inputs(window(10)).iter(), kib), "what was kept for it can go");
    }
}
