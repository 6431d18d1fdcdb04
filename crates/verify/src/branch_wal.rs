//! The WAL of a branch, as its pageserver keeps it: over the branch's ancestors, from the store or from where it has
//! just come in.
//!
//! Only WAL that carries its pages is kept, so there are gaps. What lies between two gaps is a run: it begins and ends
//! with a record, whatever pieces it is read in and whichever timelines they are of (a branch's first record joins on
//! to its ancestor's last). Behind a gap framing starts anew, and what was known of pages is out of date:
//! [`Next::Gap`].

use std::time::Duration;

use bytes::Bytes;
use varve_postgres::wal::Framer;
use varve_postgres::{Lsn, Major};

use crate::VerifyError;
use crate::wal::{Next, WalSource};

/// How long to wait before it is asked again whether there is more.
const POLL: Duration = Duration::from_millis(200);
/// Runs that an error names at most.
const RUNS_NAMED_MAX: usize = 8;

/// Where a branch's WAL can be asked for.
pub trait WalKeeper {
    /// What there is now.
    ///
    /// # Errors
    /// When it cannot be asked.
    fn list(&mut self) -> Result<Kept, VerifyError>;

    /// Bytes from `from` on, which is within what there is: at least one.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(&mut self, from: Lsn) -> Result<Bytes, VerifyError>;
}

/// What there is of a branch's WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The branch's last whole record ends here.
    pub head: Lsn,
    /// Whether somebody writes the branch.
    pub written: bool,
    /// First byte and the byte behind the last of what can be read, ascending.
    pub ranges: Vec<(Lsn, Lsn)>,
}

impl Kept {
    /// The ranges, joined where one goes on where another ends.
    fn runs(&self) -> Vec<(Lsn, Lsn)> {
        let mut runs: Vec<(Lsn, Lsn)> = Vec::new();
        for (start, end) in &self.ranges {
            match runs.last_mut() {
                Some(last) if last.1 == *start => last.1 = *end,
                _ => runs.push((*start, *end)),
            }
        }
        runs
    }
}

/// Which branch, and how much of its WAL.
#[derive(Debug, Clone)]
pub struct BranchExtent {
    /// The branch's name, for messages.
    pub branch: String,
    /// The major that writes it.
    pub major: Major,
    /// Its cluster.
    pub system_identifier: u64,
    /// Where to begin, if not with the first that there is.
    pub from: Option<Lsn>,
    /// Where to end: before it is reached, what a compute writes is waited for.
    pub until: Lsn,
}

/// The WAL of a branch. See the [module](self).
#[derive(Debug)]
pub struct BranchWal<K> {
    keeper: K,
    extent: BranchExtent,
    framer: Framer,
    input: Bytes,
    /// The run that is being read goes at least up to here.
    run_end: Lsn,
}

impl<K: WalKeeper> BranchWal<K> {
    /// Finds out what there is, and where it begins.
    ///
    /// # Errors
    /// When there is none, or none where it is to begin; with what to do.
    pub fn open(mut keeper: K, extent: BranchExtent) -> Result<BranchWal<K>, VerifyError> {
        let runs = keeper.list()?.runs();
        let refused = |what: String| VerifyError::Server { server: extent.branch.clone(), what };
        let Some(first) = runs.first() else {
            return Err(refused(
                "there is no WAL of which redo can be checked: only WAL that carries its pages is kept. On the branch's compute run \
                 ALTER SYSTEM SET wal_consistency_checking = 'all' and SELECT pg_reload_conf(), then the load, then this again"
                    .to_owned(),
            ));
        };
        let (start, run_end) = match extent.from {
            None => *first,
            Some(from) => *runs
                .iter()
                .find(|(start, end)| (*start..*end).contains(&from))
                .ok_or_else(|| refused(format!("no WAL is kept at {from}; there is {}", named(&runs))))?,
        };
        let framer = match extent.from.map(Lsn::page_start) {
            // From a page's start, the records that begin on it can be found.
            Some(page) if page > start => Framer::from_page(extent.major, Some(extent.system_identifier), page),
            _ => Framer::new(extent.major, Some(extent.system_identifier), start, None),
        };
        Ok(BranchWal { keeper, extent, framer, input: Bytes::new(), run_end })
    }

    /// Looks for what comes behind the end of the run.
    fn look_further(&mut self) -> Result<Next, VerifyError> {
        let kept = self.keeper.list()?;
        let position = self.framer.position();
        match kept.runs().into_iter().find(|(_, end)| *end > position) {
            Some((start, end)) if start <= position => {
                self.run_end = end;
                Ok(Next::Idle)
            }
            Some((start, end)) => {
                self.framer = Framer::new(self.extent.major, Some(self.extent.system_identifier), start, None);
                self.run_end = end;
                Ok(Next::Gap)
            }
            None if kept.written && kept.head < self.extent.until => {
                std::thread::sleep(POLL);
                Ok(Next::Idle)
            }
            None => Ok(Next::End),
        }
    }
}

impl<K: WalKeeper> WalSource for BranchWal<K> {
    fn major(&self) -> Major {
        self.extent.major
    }

    fn position(&self) -> Lsn {
        self.framer.framed()
    }

    fn next(&mut self) -> Result<Next, VerifyError> {
        loop {
            let framed = self.framer.next_record(&mut self.input);
            if let Some(record) = framed.map_err(|source| VerifyError::Wal { of: self.extent.branch.clone(), source })? {
                return Ok(Next::Record(record));
            }
            if self.framer.position() >= self.run_end {
                return self.look_further();
            }
            self.input = self.keeper.read(self.framer.position())?;
            if self.input.is_empty() {
                let what = format!("no WAL came from {}, though there is some up to {}", self.framer.position(), self.run_end);
                return Err(VerifyError::Server { server: self.extent.branch.clone(), what });
            }
        }
    }
}

/// Runs in words.
fn named(runs: &[(Lsn, Lsn)]) -> String {
    let shown: Vec<String> = runs.iter().take(RUNS_NAMED_MAX).map(|(start, end)| format!("{start} to {end}")).collect();
    match runs.len().saturating_sub(RUNS_NAMED_MAX) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use varve_postgres::lsn::WAL_PAGE_SIZE;
    use varve_postgres::wal::{PageHeader, RECORD_HEADER_SIZE, record_crc};

    use super::*;

    const SYSTEM: u64 = 77;
    const START: Lsn = Lsn(0x300_0000 - 3 * WAL_PAGE_SIZE);

    /// WAL from [`START`] on: its bytes, and where its records begin and end.
    fn wal() -> (Vec<u8>, Vec<(Lsn, Lsn)>) {
        let (mut bytes, mut records, mut prev): (Vec<u8>, Vec<(Lsn, Lsn)>, Lsn) = (Vec::new(), Vec::new(), Lsn(0));
        let header = |bytes: &mut Vec<u8>, remaining_len: usize| {
            let lsn = START + bytes.len() as u64;
            if lsn.page_offset() == 0 {
                let remaining_len = remaining_len as u32;
                let (major, system_identifier) = (Major::V15, Some(SYSTEM));
                let header = PageHeader { major, tli: 1, lsn, remaining_len, overwrites_contrecord: false, system_identifier };
                bytes.extend_from_slice(&header.encode());
            }
        };
        for i in 0..40usize {
            header(&mut bytes, 0);
            let start = START + bytes.len() as u64;
            // Some span pages.
            let length = RECORD_HEADER_SIZE + if i % 7 == 6 { 9000 } else { 100 + i };
            let mut record = vec![i as u8; length];
            record[..4].copy_from_slice(&(length as u32).to_le_bytes());
            record[8..16].copy_from_slice(&prev.0.to_le_bytes());
            record[16..18].copy_from_slice(&[0x00, 10]);
            let crc = record_crc(&record);
            record[20..24].copy_from_slice(&crc.to_le_bytes());
            let mut rest = &record[..];
            while !rest.is_empty() {
                header(&mut bytes, rest.len());
                let n = rest.len().min((WAL_PAGE_SIZE - (START + bytes.len() as u64).page_offset()) as usize);
                bytes.extend_from_slice(&rest[..n]);
                rest = &rest[n..];
            }
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            records.push((start, START + bytes.len() as u64));
            prev = start;
        }
        (bytes, records)
    }

    /// Gives a few bytes at a time, whatever is cut by that. Each list is the next one of `lists`; the last stays.
    #[derive(Debug)]
    struct Fake {
        bytes: Vec<u8>,
        lists: Vec<Kept>,
        piece: usize,
    }

    impl WalKeeper for Fake {
        fn list(&mut self) -> Result<Kept, VerifyError> {
            Ok(if self.lists.len() > 1 { self.lists.remove(0) } else { self.lists[0].clone() })
        }

        fn read(&mut self, from: Lsn) -> Result<Bytes, VerifyError> {
            let at = from.distance_from(START) as usize;
            let known = self.lists[0].ranges.iter().find(|(start, end)| (*start..*end).contains(&from));
            let end = known.unwrap_or_else(|| panic!("{from} is asked for, which is in none of the ranges")).1;
            let n = self.piece.min(end.distance_from(from) as usize);
            Ok(Bytes::copy_from_slice(&self.bytes[at..at + n]))
        }
    }

    fn kept(ranges: &[(Lsn, Lsn)], written: bool) -> Kept {
        Kept { head: ranges.last().map_or(START, |range| range.1), written, ranges: ranges.to_vec() }
    }

    fn open(lists: Vec<Kept>, from: Option<Lsn>, until: Lsn) -> Result<BranchWal<Fake>, VerifyError> {
        let extent = BranchExtent { branch: "acme/main".to_owned(), major: Major::V15, system_identifier: SYSTEM, from, until };
        BranchWal::open(Fake { bytes: wal().0, lists, piece: 777 }, extent)
    }

    /// What comes up to the end: starts of records, and gaps.
    fn all(mut wal: BranchWal<Fake>) -> Vec<Option<Lsn>> {
        let mut seen = Vec::new();
        loop {
            match wal.next().unwrap() {
                Next::Record(record) => seen.push(Some(record.start)),
                Next::Gap => seen.push(None),
                Next::Idle => {}
                Next::End => return seen,
            }
        }
    }

    fn starts(records: &[(Lsn, Lsn)]) -> Vec<Option<Lsn>> {
        records.iter().map(|record| Some(record.0)).collect()
    }

    #[test]
    fn runs_are_read_over_ranges_that_join_and_framed_anew_behind_gaps() {
        let (_, records) = wal();
        let (first, left, again, last) = (START, records[15].1, records[20].1, records[39].1);
        // One range ends in mid-record, where the next goes on.
        let cut = records[6].0 + 4000;
        let list = kept(&[(first, cut), (cut, left), (again, last)], false);
        let expected = [starts(&records[..16]), vec![None], starts(&records[21..])].concat();
        assert_eq!(all(open(vec![list], None, Lsn::MAX).unwrap()), expected);
    }

    #[test]
    fn it_begins_near_where_it_is_told_to() {
        let (_, records) = wal();
        let (first, last) = (records[2].1, records[39].1);
        for (n, (start, _)) in records.iter().enumerate().skip(3) {
            let seen = all(open(vec![kept(&[(first, last)], false)], Some(*start), Lsn::MAX).unwrap());
            let behind: Vec<Option<Lsn>> = seen.iter().copied().filter(|record| *record >= Some(*start)).collect();
            assert_eq!(behind, starts(&records[n..]), "all records from {start} on");
            let earliest = start.page_start();
            assert!(seen.iter().flatten().all(|record| *record >= earliest), "none before the page of {start}");
        }
        let told = open(vec![kept(&[(first, last)], false)], Some(START), Lsn::MAX).unwrap_err().to_string();
        assert_eq!(told, format!("acme/main: no WAL is kept at {START}; there is {first} to {last}"));
        let told = open(vec![kept(&[], true)], None, Lsn::MAX).unwrap_err().to_string();
        assert!(told.contains("wal_consistency_checking"), "what to do when there is none: {told}");
    }

    #[test]
    fn it_follows_while_the_branch_is_written_and_not_beyond_the_end() {
        let (_, records) = wal();
        let list = |n: usize, written| kept(&[(START, records[n].1)], written);
        let lists = vec![list(4, true), list(4, true), list(9, true), list(20, false)];
        assert_eq!(all(open(lists, None, Lsn::MAX).unwrap()), starts(&records[..21]), "what comes later is read, until nobody writes");
        assert_eq!(all(open(vec![list(4, true)], None, records[4].1).unwrap()), starts(&records[..5]), "head is as far as it is to go");
    }
}
