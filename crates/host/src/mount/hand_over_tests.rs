//! Handing blocks over, under writers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::base::Base;
use super::cells::BLOCK_BYTES;
use super::file::{FileData, Tally};
use super::file_tests::{BLOCK, Coming, FILE_BLOCKS, FORK, PatternSource, TERMS, context, land, page, read};

/// Writers own a block each and count up in it, while the base moves on all the time, to what they have written or are
/// about to, and what it has is dropped and fetched late. A reader must never see a number go down.
#[test]
fn blocks_that_are_handed_over_do_not_step_back() {
    const WANTED: u64 = 300;
    let deadline = Instant::now() + Duration::from_secs(60);
    let dir = tempfile::tempdir().unwrap();
    let source = Arc::new(PatternSource::default());
    let context = context(dir.path(), source.clone());
    let file = FileData::new(3, Base::Relation { fork: FORK, segment: 0, blocks: 0 });
    let logged: Mutex<Vec<u8>> = Mutex::new((0..FILE_BLOCKS).flat_map(|block| page(block, 0)).collect());
    file.write(&context, 0, &logged.lock()).unwrap();
    let (done, handed_over) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (context, file, logged, source, done, handed_over) = (&context, &file, &logged, &source, &done, &handed_over);
        for writer in 0..3 {
            scope.spawn(move || {
                for round in 1.. {
                    if handed_over.load(Relaxed) > WANTED || Instant::now() > deadline {
                        break;
                    }
                    // It is left alone now and then, for long enough to be handed over.
                    if round % 8 == 0 {
                        std::thread::sleep(Duration::from_micros(300));
                    }
                    let block = writer * 4;
                    let (page, offset) = (page(block, round), block as usize * BLOCK);
                    logged.lock()[offset..offset + BLOCK].copy_from_slice(&page);
                    // As the kernel does, in halves now and then.
                    for part in page.chunks(if round % 3 == 0 { BLOCK / 2 } else { BLOCK }) {
                        file.write(context, (offset + part.as_ptr().addr() - page.as_ptr().addr()) as u64, part).expect("a write");
                    }
                    assert!(read(context, file, offset as u64, BLOCK_BYTES) == page, "block {block} lost a write in round {round}");
                }
                done.fetch_add(1, Relaxed);
            });
        }
        scope.spawn(move || {
            while done.load(Relaxed) < 3 {
                context.mark.fetch_add(1, Relaxed);
                let next = logged.lock().clone();
                let late = file.claim(std::slice::from_ref(&(0..FILE_BLOCKS))).map(|flight| Coming::of(source, file, flight));
                source.move_to(next);
                let mut tally = Tally::default();
                file.hand_over(context, &TERMS, FILE_BLOCKS, &mut tally).expect("it is handed over");
                file.evict(context, 0, FILE_BLOCKS).expect("holes are made");
                if let Some(late) = late {
                    land(context, late);
                }
                file.evict(context, 0, FILE_BLOCKS).expect("holes are made");
                handed_over.fetch_add(tally.handed_over, Relaxed);
            }
        });
    });
    assert!(handed_over.load(Relaxed) > WANTED, "{handed_over:?} blocks were handed over");
}
