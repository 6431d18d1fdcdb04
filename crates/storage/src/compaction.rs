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
//! Nothing is dropped here.

use varve_postgres::Lsn;

use crate::key::Key;
use crate::layer_map::Run;

/// Runs that are worth a merge.
pub const WIDTH_MIN: usize = 4;
/// Runs in one merge at most: each costs a read-ahead buffer.
pub const WIDTH_MAX: usize = 16;

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
    last_key: Key,
    is_own: bool,
}

/// The merge that is due among `runs`, which are all block runs or all metadata runs of a timeline; `is_own` tells
/// which may be merged.
pub fn plan(runs: &[Run], is_own: impl Fn(&Run) -> bool) -> Option<MergePlan> {
    let candidate = |run: &Run| Candidate {
        start: run.lsn_start,
        end: run.lsn_end,
        bytes: run.bytes(),
        last_key: run.layers().last().map_or(Key::MIN, |layer| layer.info().last_key),
        is_own: is_own(run),
    };
    plan_candidates(&runs.iter().map(candidate).collect::<Vec<_>>())
}

fn plan_candidates(runs: &[Candidate]) -> Option<MergePlan> {
    // Others' runs lie below all own ones.
    let runs = runs.split(|run| !run.is_own).next().unwrap_or_default();
    if let Some(plan) = unfinished(runs) {
        return Some(plan);
    }
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
            Candidate { start: Lsn(end - 10), end: Lsn(end), bytes: *bytes, last_key: Key::MAX, is_own: true }
        };
        bytes.iter().enumerate().map(run).collect()
    }

    fn inputs(bytes: &[u64]) -> Vec<usize> {
        plan_candidates(&runs(bytes)).map(|plan| plan.inputs).unwrap_or_default()
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
        let plan = plan_candidates(&runs(&[10, 10, 10, 10, 1000])).unwrap();
        assert_eq!(plan.range, (Lsn(10), Lsn(50)));
    }

    #[test]
    fn odd_sizes_do_not_make_many_runs() {
        // Flushes of between a byte and a gigabyte, in a random order.
        let (mut sizes, mut random) = (Vec::new(), 1u64);
        for _ in 0..2000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sizes.insert(0, 1 << ((random >> 33) % 31));
            while let Some(plan) = plan_candidates(&runs(&sizes)) {
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
        let merged = Candidate { start: Lsn(0), end: Lsn(40), bytes: 7, last_key: Key::FIRST_METADATA, is_own: true };
        runs.insert(1, merged);
        let plan = plan_candidates(&runs).unwrap();
        assert_eq!(plan, MergePlan { inputs: vec![2, 3, 4, 5], range: (Lsn(0), Lsn(40)), done_to: Some(Key::FIRST_METADATA) });
    }

    #[test]
    fn what_belongs_to_others_is_left_alone() {
        let mut runs = runs(&[10, 10, 10, 10]);
        runs[3].is_own = false;
        assert_eq!(plan_candidates(&runs), None);
    }

    #[test]
    fn a_long_load_costs_few_moves_and_leaves_few_runs() {
        // One flush after the other, each merged as planned.
        let (mut sizes, mut moved) = (Vec::new(), 0);
        for flushed in 1..=4096u64 {
            sizes.insert(0, 1);
            while let Some(plan) = plan_candidates(&runs(&sizes)) {
                let (from, width) = (plan.inputs[0], plan.inputs.len());
                let merged: u64 = sizes.drain(from..from + width).sum();
                sizes.insert(from, merged);
                moved += merged;
            }
            assert!(sizes.len() <= 20, "{} runs after {flushed} flushes", sizes.len());
        }
        assert!(moved / 4096 <= 8, "each flushed byte was moved {} times", moved / 4096);
    }
}
