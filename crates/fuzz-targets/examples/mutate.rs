//! Mutates the inputs of `fuzz/corpus/` and runs the targets on them, with the stable compiler and without looking at
//! coverage: the short run of CI.
//!
//! What fails is written to `fuzz/artifacts/<target>/`. A run with the same seed does the same as long as the corpora
//! are the same.
//!
//! Usage: mutate [--seed NUMBER] SECONDS [TARGET...]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use varve_fuzz_targets::{TARGETS, Target};

/// As much as `scripts/fuzz` lets libFuzzer make.
const INPUT_SIZE_MAX: usize = 20_000;
/// Mutations that are made of one input at most.
const MUTATIONS_MAX: u64 = 6;
/// An input must not take longer.
const INPUT_DURATION_MAX: Duration = Duration::from_secs(10);

/// Numbers that look random (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap_or_default()
    }

    /// A number that is likely to stand at some limit.
    fn interesting(&mut self) -> u64 {
        const LIMITS: [u64; 12] = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x1FFF, 0x2000, u64::MAX];
        let limit = LIMITS[self.below(LIMITS.len())];
        limit.wrapping_add(self.next() % 3).wrapping_sub(1)
    }
}

fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = random.below(input.len());
    let len = 1 + random.below(32);
    let end = input.len().min(at + len);
    match random.below(8) {
        _ if input.is_empty() => input.extend_from_slice(other),
        0 => input[at] ^= 1 << random.below(8),
        1 => input[at] = random.next() as u8,
        2 | 3 => {
            let width = [1, 2, 4, 8][random.below(4)].min(input.len() - at);
            input[at..at + width].copy_from_slice(&random.interesting().to_le_bytes()[..width]);
        }
        4 => drop(input.drain(at..end)),
        5 => {
            let piece = input[at..end].to_vec();
            let to = random.below(input.len());
            input.splice(to..to, piece);
        }
        6 => {
            let (from, to) = (random.below(other.len()), random.below(input.len()));
            let piece = &other[from..other.len().min(from + len * 8)];
            let replaced = to..input.len().min(to + piece.len());
            input.splice(replaced, piece.iter().copied());
        }
        _ => input.truncate(at),
    }
    input.truncate(INPUT_SIZE_MAX);
}

fn read_corpus(root: &Path, name: &str) -> Result<Vec<Vec<u8>>> {
    let folder = root.join("corpus").join(name);
    let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    ensure!(!paths.is_empty(), "expected inputs in {}", folder.display());
    paths.iter().map(|path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))).collect()
}

/// Runs a target for `duration`; gives how many inputs it was given.
fn fuzz(root: &Path, (name, target): Target, seed: u64, duration: Duration) -> Result<u64> {
    let corpus = read_corpus(root, name)?;
    let mut random = Random(seed);
    let began = Instant::now();
    let mut inputs = 0;
    while began.elapsed() < duration {
        let mut input = corpus[random.below(corpus.len())].clone();
        let other = &corpus[random.below(corpus.len())];
        for _ in 0..1 + random.next() % MUTATIONS_MAX {
            mutate(&mut input, other, &mut random);
        }
        let started = Instant::now();
        let passed = catch_unwind(AssertUnwindSafe(|| target(&input))).is_ok();
        inputs += 1;
        if !passed || started.elapsed() > INPUT_DURATION_MAX {
            let folder = root.join("artifacts").join(name);
            std::fs::create_dir_all(&folder)?;
            let path = folder.join(format!("mutated-{seed}-{inputs}"));
            std::fs::write(&path, &input)?;
            let what = if passed { "takes too long" } else { "fails" };
            bail!("{name} {what} on {}: put it into fuzz/corpus/{name} with the fix, so that the tests replay it", path.display());
        }
    }
    Ok(inputs)
}

fn main() -> Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let mut seed = 1;
    if args.first().is_some_and(|arg| arg == "--seed") {
        seed = args.get(1).context("--seed needs a number")?.parse()?;
        args.drain(..2);
    }
    let usage = "usage: mutate [--seed NUMBER] SECONDS [TARGET...]";
    let seconds: f64 = args.first().context(usage)?.parse().context(usage)?;
    let duration = Duration::try_from_secs_f64(seconds)?;
    let wanted = &args[1..];
    for name in wanted {
        ensure!(TARGETS.iter().any(|(other, _)| other == name), "there is no fuzz target '{name}'");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    for target in TARGETS.into_iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|other| other == name)) {
        let inputs = fuzz(&root, target, seed, duration)?;
        println!("{:<28} {inputs} inputs in {seconds} s", target.0);
    }
    Ok(())
}
