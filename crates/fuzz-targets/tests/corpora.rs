//! What the fuzzer has found, and real seeds, on every run of the tests.

use std::path::Path;

use varve_fuzz_targets::TARGETS;

#[test]
fn every_input_of_the_corpora_passes() -> anyhow::Result<()> {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    for (name, target) in TARGETS {
        let mut inputs = 0;
        for entry in std::fs::read_dir(corpora.join(name))? {
            let path = entry?.path();
            println!("{}", path.display()); // the last one is the one that fails
            target(&std::fs::read(&path)?);
            inputs += 1;
        }
        assert!(inputs > 0, "expected inputs in fuzz/corpus/{name}");
    }
    Ok(())
}

#[test]
fn every_target_stands_no_input_and_noise() {
    let noise: Vec<u8> = (0..10_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for (name, target) in TARGETS {
        println!("{name}");
        for end in [0, 1, 2, 7, 40, 500, noise.len()] {
            target(&noise[..end]);
        }
    }
}
