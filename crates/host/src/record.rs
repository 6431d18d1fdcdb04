//! What a host keeps in its folder: small files, each in an envelope with magic, version, length and checksum.
//!
//! A file is written beside its name, fsynced, renamed, and its folder is fsynced: a crash leaves the old one or the
//! new one. A file that is damaged or of a newer version is an error that names it; nobody writes over it.
//!
//! On a full disk records are written all the same: the folder has a reserve for them ([`reserve`]).
//!
//! Nothing stands here that the tenant log has: a record says which process runs here for which endpoint, not what
//! should run.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::identity::ProcessId;
use crate::reserve;

/// Version of all of them.
const VERSION: u16 = 1;
/// Bytes before the content: magic, version, two zeros, length.
const HEAD: usize = 12;
/// Largest content that is read.
const CONTENT_MAX: u64 = 1024 * 1024;

/// A file of the host's that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system said no.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{path} is damaged ({what}); it is left alone", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// A newer Varve wrote it.
    #[error("{path} has format version {version}, this varve knows version {VERSION}: use the newer varve that wrote it", path = .path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u16,
    },
}

/// A kind of file, with its magic.
pub trait Record: Serialize + DeserializeOwned {
    /// The first four bytes.
    const MAGIC: [u8; 4];

    /// Writes it to `path`, readable by us alone.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    fn write(&self, path: &Path) -> Result<(), RecordError> {
        let content = serde_json::to_vec(self).map_err(|source| RecordError::Io { path: path.to_owned(), source: source.into() })?;
        write_file(path, &envelope(Self::MAGIC, &content)).map_err(|source| RecordError::Io { path: path.to_owned(), source })
    }

    /// Reads it from `path`; none where there is none.
    ///
    /// # Errors
    /// [`RecordError`].
    fn read(path: &Path) -> Result<Option<Self>, RecordError> {
        let failed = |source| RecordError::Io { path: path.to_owned(), source };
        let bytes = match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(file) if file.len() > CONTENT_MAX => return Err(RecordError::Damaged { path: path.to_owned(), what: "too large" }),
            Ok(_) => std::fs::read(path).map_err(failed)?,
        };
        let content = content(Self::MAGIC, &bytes).map_err(|wrong| match wrong {
            Wrong::Damaged(what) => RecordError::Damaged { path: path.to_owned(), what },
            Wrong::Newer(version) => RecordError::Newer { path: path.to_owned(), version },
        })?;
        let record = serde_json::from_slice(content);
        record.map(Some).map_err(|_| RecordError::Damaged { path: path.to_owned(), what: "its content cannot be read" })
    }
}

/// Who the host is: `host` in its folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Id, 32 hexadecimal digits, made once.
    pub id: String,
}

impl Record for HostRecord {
    const MAGIC: [u8; 4] = *b"VHID";
}

/// A compute that is or was here: `<endpoint>.compute` in the host's folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComputeRecord {
    /// The endpoint's id.
    pub endpoint: String,
    /// The tenant's id.
    pub tenant: String,
    /// Addresses that it was started to listen on.
    pub listen: String,
    /// Port that it was started to listen on.
    pub port: u16,
    /// Its process, from when it was started until it was seen to be gone.
    pub process: Option<ProcessId>,
    /// User id of its sandbox, which no other compute has while this record is there.
    #[serde(default)]
    pub uid: Option<u32>,
}

impl Record for ComputeRecord {
    const MAGIC: [u8; 4] = *b"VHCR";
}

/// The postmaster that a compute process started: `<endpoint>.postmaster`, outside what Postgres's user can write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostmasterRecord {
    /// The process.
    pub process: ProcessId,
}

impl Record for PostmasterRecord {
    const MAGIC: [u8; 4] = *b"VHPM";
}

/// Who wrote the WAL in a compute's `pg_wal`: `<endpoint>.writer`, outside what Postgres's user can write, from before
/// Postgres starts until the pageserver has all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterRecord {
    /// The timeline, 32 hexadecimal digits.
    pub timeline_id: String,
    /// The writer epoch.
    pub epoch: u32,
    /// Postgres major.
    pub pg_version: u32,
}

impl Record for WriterRecord {
    const MAGIC: [u8; 4] = *b"VHWR";
}

fn envelope(magic: [u8; 4], content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + content.len() + 4);
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&VERSION.to_be_bytes());
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&(content.len() as u32).to_be_bytes());
    bytes.extend_from_slice(content);
    let crc = crc_fast::crc32_iscsi(&bytes);
    bytes.extend_from_slice(&crc.to_be_bytes());
    bytes
}

#[derive(Debug, PartialEq, Eq)]
enum Wrong {
    Damaged(&'static str),
    Newer(u16),
}

fn content(magic: [u8; 4], bytes: &[u8]) -> Result<&[u8], Wrong> {
    let (body, crc) = bytes.split_last_chunk::<4>().ok_or(Wrong::Damaged("too short"))?;
    if body.len() < HEAD {
        return Err(Wrong::Damaged("too short"));
    }
    if body[..4] != magic {
        return Err(Wrong::Damaged("it is no such file"));
    }
    if crc_fast::crc32_iscsi(body) != u32::from_be_bytes(*crc) {
        return Err(Wrong::Damaged("its checksum does not match"));
    }
    let version = u16::from_be_bytes([body[4], body[5]]);
    if version > VERSION {
        return Err(Wrong::Newer(version));
    }
    let length = u32::from_be_bytes([body[8], body[9], body[10], body[11]]);
    let content = &body[HEAD..];
    if version == 0 || body[6..8] != [0, 0] || content.len() != length as usize {
        return Err(Wrong::Damaged("its head does not fit its content"));
    }
    Ok(content)
}

/// Writes a file so that a crash leaves the old one or the new one. On a full disk it takes the folder's reserve.
///
/// # Errors
/// Those of the file system.
pub fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    reserve::with_reserve(folder, || replace_file(folder, path, bytes))
}

fn replace_file(folder: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    File::open(folder)?.sync_all()
}

/// Removes a file, for good; one that is not there is gone already.
///
/// # Errors
/// Those of the file system.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    File::open(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ComputeRecord {
        let process = ProcessId { pid: 7, start: "99".to_owned(), boot: "b".to_owned() };
        let text = |text: &str| text.to_owned();
        ComputeRecord {
            endpoint: text("e1"),
            tenant: text("t1"),
            listen: text("127.0.0.1"),
            port: 5433,
            process: Some(process),
            uid: Some(2_000_000),
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e1.compute");
        assert_eq!(ComputeRecord::read(&path).unwrap(), None);
        record().write(&path).unwrap();
        assert_eq!(ComputeRecord::read(&path).unwrap(), Some(record()));
        let gone = ComputeRecord { process: None, ..record() };
        gone.write(&path).unwrap();
        assert_eq!(ComputeRecord::read(&path).unwrap(), Some(gone));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
        remove_file(&path).unwrap();
        remove_file(&path).unwrap();
        assert_eq!(ComputeRecord::read(&path).unwrap(), None);
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_noticed() {
        let bytes = envelope(ComputeRecord::MAGIC, b"{\"some\":\"content\"}");
        assert!(content(ComputeRecord::MAGIC, &bytes).is_ok());
        for at in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[at / 8] ^= 1 << (at % 8);
            assert!(matches!(content(ComputeRecord::MAGIC, &damaged), Err(Wrong::Damaged(_))), "bit {at}");
        }
        for length in 0..bytes.len() {
            assert!(content(ComputeRecord::MAGIC, &bytes[..length]).is_err(), "cut to {length}");
        }
        assert!(content(HostRecord::MAGIC, &bytes).is_err(), "one kind is not read as another");
    }

    #[test]
    fn a_newer_version_is_named() {
        let mut bytes = envelope(HostRecord::MAGIC, b"{}");
        bytes[5] = 2;
        let at = bytes.len() - 4;
        let crc = crc_fast::crc32_iscsi(&bytes[..at]);
        bytes[at..].copy_from_slice(&crc.to_be_bytes());
        assert_eq!(content(HostRecord::MAGIC, &bytes), Err(Wrong::Newer(2)));
    }
}
