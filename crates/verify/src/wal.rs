//! Redoes WAL that carries its pages (`wal_consistency_checking = all`) and compares.

use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;
use varve_postgres::wal::record_type::record_type;
use varve_postgres::wal::{FramedRecord, Record, rmgr};
use varve_postgres::{Lsn, Major};
use varve_redo::verify::{Difference, Mismatch, Report, Verifier};

use crate::VerifyError;

/// What a source of WAL has next.
#[derive(Debug)]
pub enum Next {
    /// A record.
    Record(FramedRecord),
    /// WAL is missing here, so what was known of pages does not hold any more; the next record begins behind that.
    Gap,
    /// Nothing yet; there may be more later.
    Idle,
    /// There is no more.
    End,
}

/// WAL, record by record.
pub trait WalSource {
    /// The major that wrote it.
    fn major(&self) -> Major;

    /// Where the next record begins, or the rest of one that is not yet whole.
    fn position(&self) -> Lsn;

    /// The next record. May wait a moment for one, but no longer than a fraction of a second.
    ///
    /// # Errors
    /// When the WAL cannot be read, or is damaged.
    fn next(&mut self) -> Result<Next, VerifyError>;
}

/// How far to go.
#[derive(Debug, Clone, Copy)]
pub struct Extent<'a> {
    /// Records that begin before are passed over.
    pub from: Lsn,
    /// Records that end behind it are left out.
    pub until: Lsn,
    /// Stops the work when it becomes true.
    pub stop: &'a AtomicBool,
}

/// Redoes the records of `source` and compares. `progress` is called now and then with how far it is.
///
/// What goes wrong is in the result, with what was found before; see [`WalReport::failure`].
pub fn verify(source: &mut dyn WalSource, mut verifier: Verifier, extent: Extent<'_>, progress: &mut dyn FnMut(Lsn)) -> WalReport {
    let mut seen = Seen { first: None, end: source.position(), gaps: 0 };
    let failure = run(source, &mut verifier, extent, &mut seen, progress).err().map(|error| error.to_string());
    WalReport::new(source.major(), &seen, &verifier, failure)
}

/// Which WAL was seen.
struct Seen {
    first: Option<Lsn>,
    end: Lsn,
    gaps: u64,
}

fn run(
    source: &mut dyn WalSource,
    verifier: &mut Verifier,
    extent: Extent<'_>,
    seen: &mut Seen,
    progress: &mut dyn FnMut(Lsn),
) -> Result<(), VerifyError> {
    /// Records between two calls of `progress`.
    const PROGRESS_RECORDS: u64 = 4096;
    let mut count = 0u64;
    while !extent.stop.load(Ordering::Relaxed) {
        let framed = match source.next()? {
            Next::Record(framed) => framed,
            Next::Gap => {
                verifier.forget_pages();
                seen.gaps += 1;
                continue;
            }
            Next::Idle => {
                progress(source.position());
                continue;
            }
            Next::End => break,
        };
        if framed.start < extent.from {
            continue;
        }
        if framed.end > extent.until {
            break;
        }
        let decoded = Record::decode(&framed.bytes, framed.start, framed.end, source.major());
        let record = decoded.map_err(|source| VerifyError::Wal { of: "a record with the right CRC".to_owned(), source })?;
        verifier.record(&record)?;
        seen.first.get_or_insert(record.start);
        seen.end = record.end;
        count += 1;
        if count.is_multiple_of(PROGRESS_RECORDS) {
            progress(record.end);
        }
        if record.end >= extent.until {
            break;
        }
    }
    Ok(())
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct WalReport {
    /// The major that wrote the WAL.
    pub pg_version: u32,
    /// Start of the first record.
    pub from: String,
    /// End of the last record.
    pub to: String,
    /// Places between the two where WAL is missing. Behind each, pages are unknown anew.
    pub gaps: u64,
    /// Records.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Pages that were compared and found equal.
    pub compared: u64,
    /// Pages whose state before the WAL was not known, so that the first image was taken for true.
    pub adopted: u64,
    /// Pages that differ as those of Postgres's own recovery do, which complains of them, too: no mismatch.
    pub postgres_own: u64,
    /// Pages that differ, or could not be redone.
    pub mismatches: u64,
    /// Whether pages were compared and all were equal.
    pub matched: bool,
    /// Why the WAL was not read to its end, if so.
    pub failure: Option<String>,
    /// By record type.
    pub types: Vec<TypeReport>,
    /// The first mismatches of each record type.
    pub first_mismatches: Vec<MismatchReport>,
    /// Bytes that pages took in the temporary file.
    pub overflow_bytes: u64,
    /// The first mismatch whose pages can be shown side by side.
    #[serde(skip)]
    pub first_difference: Option<Mismatch>,
}

/// What was found of one record type.
#[derive(Debug, Serialize)]
pub struct TypeReport {
    /// Resource manager, as `pg_waldump` names it.
    pub rmgr: String,
    /// Record type, as `pg_waldump` names it.
    pub record: String,
    /// The type's number.
    pub info: String,
    /// Records.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Mean nanoseconds that redo of a record took, its images included.
    pub ns_per_record: u64,
    /// Pages that were redone.
    pub redone: u64,
    /// Pages that the record had an image of.
    pub images: u64,
    /// Pages whose first image was taken for true.
    pub adopted: u64,
    /// Pages compared and found equal.
    pub compared: u64,
    /// Pages that differ as those of Postgres's own recovery do.
    pub postgres_own: u64,
    /// Pages that differ, or could not be redone.
    pub mismatches: u64,
}

/// A page that is not as it must be.
#[derive(Debug, Serialize)]
pub struct MismatchReport {
    /// Resource manager.
    pub rmgr: String,
    /// Record type.
    pub record: String,
    /// Where the record begins.
    pub start: String,
    /// Where it ends.
    pub end: String,
    /// Relation fork, tablespace/database/file number.
    pub relation: String,
    /// Block.
    pub block: u32,
    /// Why it could not be compared, if so.
    pub error: Option<String>,
    /// Offsets of the bytes that differ.
    pub differs_at: Vec<u16>,
}

impl WalReport {
    fn new(major: Major, seen: &Seen, verifier: &Verifier, failure: Option<String>) -> WalReport {
        let report: &Report = verifier.report();
        let types: Vec<TypeReport> = report
            .types
            .iter()
            .map(|((rmid, info), stats)| TypeReport {
                rmgr: rmgr::name(*rmid),
                record: record_type(major, *rmid, *info),
                info: format!("{info:02X}"),
                count: stats.count,
                bytes: stats.bytes,
                ns_per_record: stats.nanos.checked_div(stats.count).unwrap_or(0),
                redone: stats.pages,
                images: stats.images,
                adopted: stats.adopted,
                compared: stats.compared,
                postgres_own: stats.postgres_own,
                mismatches: stats.mismatches,
            })
            .collect();
        let sum = |of: fn(&TypeReport) -> u64| types.iter().map(of).sum::<u64>();
        let first_mismatches = report.mismatches.iter().map(|mismatch| MismatchReport {
            rmgr: rmgr::name(mismatch.rmid),
            record: record_type(major, mismatch.rmid, mismatch.info),
            start: mismatch.start.to_string(),
            end: mismatch.end.to_string(),
            relation: mismatch.rel.to_string(),
            block: mismatch.blkno,
            error: match &mismatch.difference {
                Difference::Failed(what) => Some(what.clone()),
                Difference::Bytes { .. } => None,
            },
            differs_at: match &mismatch.difference {
                Difference::Failed(_) => Vec::new(),
                Difference::Bytes { at, .. } => at.clone(),
            },
        });
        let compared = sum(|t| t.compared);
        WalReport {
            pg_version: major.number(),
            from: seen.first.unwrap_or(seen.end).to_string(),
            to: seen.end.to_string(),
            gaps: seen.gaps,
            records: sum(|t| t.count),
            bytes: sum(|t| t.bytes),
            compared,
            adopted: sum(|t| t.adopted),
            postgres_own: sum(|t| t.postgres_own),
            mismatches: report.mismatch_count,
            matched: failure.is_none() && report.mismatch_count == 0 && compared > 0,
            failure,
            first_mismatches: first_mismatches.collect(),
            types,
            overflow_bytes: verifier.pages().overflow_bytes(),
            first_difference: report.mismatches.iter().find(|mismatch| matches!(mismatch.difference, Difference::Bytes { .. })).cloned(),
        }
    }
}
