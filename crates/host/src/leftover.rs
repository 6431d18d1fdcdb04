//! WAL that is left in `pg_wal` when Postgres runs no more: what of it the pageserver lacks is sent, before the compute
//! begins again or says that it has stopped.
//!
//! Others may have heard of it: clients that commit asynchronously, a publisher whose subscriber reported it. Stock
//! Postgres has it after a crash of its processes, and so has the branch. It can be lost with the host only.
//!
//! `pg_wal` is in a folder that Postgres's user can write. Nothing there is followed that is a link, only plain files
//! are read, and what is sent is whole records with the right checksums; the pageserver checks them again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, stream};
use rustix::fs::{Mode, OFlags};
use varve_api::client::ClientError;
use varve_api::host::LeftoverQuery;
use varve_postgres::lsn::WAL_SEGMENT_SIZE;
use varve_postgres::wal::Framer;
use varve_postgres::{Lsn, Major};

use crate::record::{Record as _, RecordError, WriterRecord, remove_file};
use crate::server::Server;

/// Bytes that are read at once.
const PIECE: u64 = 1024 * 1024;

/// Why leftover WAL was not sent.
#[derive(Debug, thiserror::Error)]
pub enum LeftoverError {
    /// The server is away, or does not take it.
    #[error(transparent)]
    Server(#[from] ClientError),
    /// Who wrote it is not known.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// It cannot be read.
    #[error("pg_wal: {0}")]
    Read(#[from] io::Error),
}

/// The files of a compute that are looked at.
#[derive(Clone, Debug)]
pub struct Leftover {
    /// Its `pg_wal`.
    pub pg_wal: PathBuf,
    /// The record of who wrote it.
    pub record: PathBuf,
}

impl Leftover {
    /// Sends what is left, if anything is. Postgres must not run. What was sent, or does not count any more, is not
    /// sent again.
    ///
    /// # Errors
    /// [`LeftoverError`].
    pub async fn send(&self, server: &Server) -> Result<(), LeftoverError> {
        let Some(writer) = WriterRecord::read(&self.record)? else { return Ok(()) };
        let query = LeftoverQuery { timeline_id: writer.timeline_id.clone(), epoch: writer.epoch, start: None, end: None };
        let major = Major::from_number(writer.pg_version).ok_or_else(|| io::Error::other("written by an unknown major"))?;
        if let Some(start) = server.leftover_start(&query).await? {
            let wal = Segments { folder: self.pg_wal.clone() };
            let looked = wal.clone();
            let end = tokio::task::spawn_blocking(move || looked.end(major, start)).await.map_err(io::Error::other)??;
            let held = wal.clone();
            // With nothing more than the pageserver has this says that there is nothing more.
            let is_all = end > start || tokio::task::spawn_blocking(move || held.ends_with(start)).await.map_err(io::Error::other)??;
            if is_all {
                tracing::info!(%start, %end, "what Postgres had in its pg_wal is sent to the pageserver");
                let query = LeftoverQuery { start: Some(start.to_string()), end: Some(end.to_string()), ..query };
                server.leftover(&query, wal.stream(start, end)).await?;
            }
        }
        Ok(remove_file(&self.record).map_err(|source| RecordError::Io { path: self.record.clone(), source })?)
    }
}

/// The segment files of a `pg_wal`.
#[derive(Clone, Debug)]
struct Segments {
    folder: PathBuf,
}

impl Segments {
    /// The segment that holds `at`, of the highest timeline; none if there is no such file.
    fn open(&self, at: Lsn) -> io::Result<Option<File>> {
        let segments_per_id = (1 << 32) / WAL_SEGMENT_SIZE;
        let number = at.0 / WAL_SEGMENT_SIZE;
        let suffix = format!("{:08X}{:08X}", number / segments_per_id, number % segments_per_id);
        let folder = open_beneath(rustix::fs::CWD, &self.folder, OFlags::DIRECTORY)?;
        let is_it = |name: &str| name.len() == 24 && name.ends_with(&suffix) && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        let mut found: Option<String> = None;
        for entry in rustix::fs::Dir::read_from(&folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if is_it(&name) && found.as_ref().is_none_or(|found| *found < name) {
                found = Some(name);
            }
        }
        let Some(name) = found else { return Ok(None) };
        let file = File::from(open_beneath(&folder, Path::new(&name), OFlags::NONBLOCK)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other(format!("{name} is no plain file")));
        }
        Ok(Some(file))
    }

    /// At most [`PIECE`] bytes from `at` on, all of one segment; none where there is no such file.
    fn read(&self, at: Lsn) -> io::Result<Bytes> {
        let Some(file) = self.open(at)? else { return Ok(Bytes::new()) };
        let offset = at.0 % WAL_SEGMENT_SIZE;
        let mut bytes = vec![0; PIECE.min(WAL_SEGMENT_SIZE - offset) as usize];
        let mut read = 0;
        while read < bytes.len() {
            match file.read_at(&mut bytes[read..], offset + read as u64)? {
                0 => break,
                more => read += more,
            }
        }
        bytes.truncate(read);
        Ok(bytes.into())
    }

    /// Whether the byte before `at` is there.
    fn ends_with(&self, at: Lsn) -> io::Result<bool> {
        Ok(self.open(Lsn(at.0.saturating_sub(1)))?.is_some())
    }

    /// Where the last whole record ends that joins on to `start`.
    fn end(&self, major: Major, start: Lsn) -> io::Result<Lsn> {
        let mut framer = Framer::new(major, None, start, None);
        loop {
            let mut bytes = self.read(framer.position())?;
            if bytes.is_empty() {
                return Ok(framer.framed());
            }
            loop {
                match framer.next_record(&mut bytes) {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    // What stands there is of a former use of the file, or was never whole.
                    Err(_) => return Ok(framer.framed()),
                }
            }
        }
    }

    /// The bytes from `start` to `end`, in pieces.
    fn stream(self, start: Lsn, end: Lsn) -> BoxStream<'static, io::Result<Bytes>> {
        let pieces = stream::unfold(Some(start), move |at| {
            let wal = self.clone();
            async move {
                let at = at.filter(|at| *at < end)?;
                let read = tokio::task::spawn_blocking(move || wal.read(at)).await.map_err(io::Error::other).flatten();
                match read {
                    Ok(bytes) if bytes.is_empty() => Some((Err(io::Error::other(format!("there is no WAL at {at} any more"))), None)),
                    Ok(mut bytes) => {
                        bytes.truncate((end.0 - at.0).min(bytes.len() as u64) as usize);
                        let next = at + bytes.len() as u64;
                        Some((Ok(bytes), Some(next)))
                    }
                    Err(error) => Some((Err(error), None)),
                }
            }
        });
        pieces.boxed()
    }
}

/// Opens a name in a folder to read, not following a link.
fn open_beneath(folder: impl rustix::fd::AsFd, name: &Path, flags: OFlags) -> io::Result<rustix::fd::OwnedFd> {
    Ok(rustix::fs::openat(folder, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | flags, Mode::empty())?)
}
