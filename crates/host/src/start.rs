//! From the pageserver's answer to a mounted data directory: the base backup's files, the mount, the blocks that every
//! start reads.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, chown};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use varve_api::admin::EventKind;
use varve_api::host::{Begin, StartupBlocks};
use varve_postgres::lsn::WAL_SEGMENT_SIZE;
use varve_postgres::settings::Configuration;
use varve_postgres::{Fork, Lsn, Major, RelFork, RelNode};
use varve_protocol::client::{BaseBackup, BaseBackupOptions};
use varve_protocol::connect::{ClientError, ConnectConfig, Endpoint};

use crate::asked::Asked;
use crate::config;
use crate::dirs::Dirs;
use crate::events::Events;
use crate::files::{self, Uploader};
use crate::kept_pages::{self, PutBackError, Taken};
use crate::mount::{Fullness, InitialContent, InitialFile, Mount, MountConfig, RoomCallback};
use crate::page_fetcher::PageFetcher;
use crate::server::Server;
use crate::start_failure::{self, Given};
use crate::tablespaces;

/// How long the page service may be silent while a base backup comes: it may have to ingest first.
const BACKUP_SILENCE_MAX: Duration = Duration::from_secs(120);
/// Largest file of a base backup that is held in memory: an SLRU-free backup has none beyond statistics.
const FILE_SIZE_MAX: u64 = 256 * 1024 * 1024;

/// Why the data directory could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The server named something that we do not understand.
    #[error("the server's answer holds {what}, which this varve does not understand: '{text}'")]
    Begin {
        /// What it should be.
        what: &'static str,
        /// What it is.
        text: String,
    },
    /// The base backup did not come, or broke off.
    #[error("the base backup did not come: {0}")]
    Backup(#[from] ClientError),
    /// The base backup holds something that does not belong there, or could not be stored.
    #[error("the base backup cannot be taken apart: {0}")]
    Unpack(io::Error),
    /// Kept pages.
    #[error("the data directory cannot be made as it was: {0}")]
    Pages(#[from] PutBackError),
    /// The mount.
    #[error("the data directory cannot be mounted: {0}")]
    Mount(#[source] io::Error),
    /// Something else on this host.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl MountError {
    /// Whether it may go well another time.
    pub fn is_transient(&self) -> bool {
        match self {
            MountError::Backup(error) => error.is_transient(),
            MountError::Pages(error) => error.is_transient(),
            // The server may go away in the middle of it.
            MountError::Unpack(error) | MountError::Mount(error) => broke_off(error),
            _ => false,
        }
    }

    fn begin(what: &'static str, text: &(impl ToString + ?Sized)) -> MountError {
        MountError::Begin { what, text: text.to_string() }
    }
}

/// Whether an error says that a connection broke, here or further down.
fn broke_off(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, TimedOut, UnexpectedEof};
    if matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionRefused | ConnectionReset | TimedOut | UnexpectedEof) {
        return true;
    }
    let mut source: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|inner| inner as _);
    while let Some(inner) = source {
        if inner.downcast_ref::<ClientError>().is_some_and(ClientError::is_transient)
            || inner.downcast_ref::<io::Error>().is_some_and(broke_off)
        {
            return true;
        }
        source = inner.source();
    }
    false
}

/// Where the page service listens, as a client of it.
pub(crate) fn page_service(begin: &Begin) -> Result<ConnectConfig, MountError> {
    let (host, port) = begin
        .page_service
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)))
        .ok_or_else(|| MountError::begin("the address of a page service", &begin.page_service))?;
    Ok(ConnectConfig::new(Endpoint::tcp(host, port), "varve"))
}

/// What a branch brings of settings.
#[derive(Clone, Debug)]
pub struct Brought {
    /// All that are not Postgres's defaults.
    pub given: Vec<Given>,
    /// What they ask for of those that the command line holds.
    pub asked: Asked,
    /// What is not as it was, in words.
    pub warnings: Vec<String>,
}

/// Fetches the base backup and mounts the data directory. Gives the settings that it brings, and where its pages come
/// from.
pub(crate) async fn mount(
    server: &Server,
    begin: &Arc<Begin>,
    dirs: &Dirs,
    uploader: &Arc<Uploader>,
    (cache_bytes, events): (Option<u64>, &Events),
) -> Result<(Mount, Brought, Arc<PageFetcher>), MountError> {
    let (server, begin, dirs, uploader, events) = (server.clone(), begin.clone(), dirs.clone(), uploader.clone(), events.clone());
    let mount = move || mount_blocking(&server, &begin, &dirs, &uploader, (cache_bytes, &events));
    tokio::task::spawn_blocking(mount).await.map_err(io::Error::other)?
}

/// Tells how full the disk is.
fn room_events(dirs: &Dirs, events: &Events) -> RoomCallback {
    let (folder, events) = (dirs.home().display().to_string(), events.clone());
    Box::new(move |fullness, free| {
        let free = free >> 20;
        match fullness {
            Fullness::Room => tracing::info!(folder, free_mb = free, "the disk has room again"),
            Fullness::Near => events.tell(EventKind::DiskNearlyFull, format!("the disk of {folder} will be full soon: {free} MB are left")),
            Fullness::Full => {
                let words = format!(
                    "the disk of {folder} is full, {free} MB are left: relations and temporary files cannot grow until there is room"
                );
                events.tell(EventKind::DiskFull, words);
            }
        }
    })
}

fn mount_blocking(
    server: &Server,
    begin: &Begin,
    dirs: &Dirs,
    uploader: &Uploader,
    (cache_bytes, events): (Option<u64>, &Events),
) -> Result<(Mount, Brought, Arc<PageFetcher>), MountError> {
    let started = Instant::now();
    let lsn: Lsn = begin.base_lsn.parse().map_err(|_| MountError::begin("an LSN", &begin.base_lsn))?;
    let connection = page_service(begin)?;
    // Who writes the branch goes on at its head, with all that was written there.
    let options = BaseBackupOptions { no_slru: true, newest_files: begin.epoch.is_some(), short_wal: true, ..BaseBackupOptions::default() };
    let backup = BaseBackup::start(&connection, &begin.tenant_id, &begin.timeline_id, Some(lsn), options, BACKUP_SILENCE_MAX)?;
    let mut files = fetch(backup, dirs)?;
    let fetched = started.elapsed();
    let mut settings: Vec<Given> =
        begin.settings.iter().map(|(name, value)| Given { name: name.clone(), value: value.clone(), source: "--set" }).collect();
    for file in &mut files {
        let InitialContent::File(bytes) = &mut file.content else { continue };
        let source = match &*file.path {
            "postgresql.auto.conf" => "ALTER SYSTEM",
            "postgresql.conf" => "postgresql.conf",
            _ => continue,
        };
        // Ours, which it would override. No session need come about to take it back.
        if source == "ALTER SYSTEM" && files::sets_standby_names(bytes) {
            let mut configuration = Configuration::parse(&String::from_utf8_lossy(bytes));
            configuration.reset(files::STANDBY_NAMES);
            *bytes = configuration.to_text().into();
        }
        settings.extend(start_failure::given(bytes, source));
    }
    let users_own = |name: &str| {
        files.iter().find_map(|file| match &file.content {
            InitialContent::File(bytes) if file.path == name => Some(String::from_utf8_lossy(bytes).into_owned()),
            _ => None,
        })
    };
    dirs.write("pg_hba.conf", &config::pg_hba_conf(dirs.isolation(), &users_own("pg_hba.conf").unwrap_or_default()))?;
    dirs.write("pg_ident.conf", &config::pg_ident_conf(&users_own("pg_ident.conf").unwrap_or_default()))?;
    let asked = Asked::of(&files);
    for folder in asked.folders().iter().filter_map(|folder| folder.to_str()) {
        if files.iter().all(|file| file.path != folder) {
            files.push(InitialFile { path: folder.to_owned(), mode: 0o700, content: InitialContent::Directory });
        }
    }
    let source = Arc::new(PageFetcher::new(connection, &begin.tenant_id, &begin.timeline_id, lsn));
    let user = dirs.user();
    let major = Major::from_number(begin.pg_version).ok_or_else(|| MountError::begin("a major of Postgres", &begin.pg_version))?;
    let name = format!("{}/{}", begin.tenant, begin.branch);
    let mut config = MountConfig::new(&name, &dirs.pgdata(), &dirs.cache(), (major, begin.catalog_version), source.clone());
    config.cache_bytes = cache_bytes;
    config.uid = user.uid;
    config.gid = user.gid;
    config.initial_files = files;
    config.databases = begin.databases.clone();
    config.tablespaces = tablespaces::of(begin, dirs.isolation());
    config.observer = Some(uploader.observer());
    config.on_room = Some(room_events(dirs, events));
    let mount = Mount::start(config).map_err(|error| MountError::Mount(io::Error::other(error)))?;
    let mounted = started.elapsed();
    // Before anything is read there.
    let lost = kept_pages::put_back(&mount, server, &begin.pages)?;
    let put_back = started.elapsed();
    let blocks: Vec<(RelFork, u32)> = begin
        .startup_blocks
        .iter()
        .filter_map(|(spc, db, rel, fork, block)| Some((RelNode { spc: *spc, db: *db, rel: *rel }.fork(Fork::from_number(*fork)?), *block)))
        .collect();
    // Postgres needs a while before it reads the first of them.
    drop(mount.prefetch_behind(&blocks).map_err(|error| MountError::Mount(io::Error::other(error)))?);
    tracing::info!(
        backup_ms = fetched.as_millis(),
        mount_ms = (mounted - fetched).as_millis(),
        pages_ms = (put_back - mounted).as_millis(),
        "the data directory is there"
    );
    Ok((mount, Brought { given: settings, asked, warnings: lost.into_iter().collect() }, source))
}

/// Tells the pageserver what this start read, so that later ones of the same template get it in one batch.
pub(crate) fn tell_startup_blocks(server: &Server, mount: &Mount) {
    let named = |(rel, block): (RelFork, u32)| (rel.node.spc, rel.node.db, rel.node.rel, rel.fork.number(), block);
    let blocks = StartupBlocks { blocks: mount.touched_blocks().into_iter().map(named).collect() };
    let server = server.clone();
    tokio::spawn(async move {
        if let Err(error) = server.startup_blocks(&blocks).await {
            tracing::info!(%error, "the blocks that a start reads are not known to the pageserver");
        }
    });
}

/// Takes what WAL does not give back out of a mount whose Postgres has ended cleanly.
pub(crate) async fn take_pages(mount: Mount, server: &Server, begin: &Arc<Begin>) -> io::Result<(Mount, Taken)> {
    let (server, begin) = (server.clone(), begin.clone());
    let take = move || {
        let taken = kept_pages::take(&mount, &server, &begin.pages).unwrap_or_else(|error| {
            tracing::error!(%error, "pages that WAL does not give back are not kept");
            let left_out = vec![format!("sequences go on up to 32 values later, and unlogged relations begin empty: {error}")];
            Taken { left_out, ..Taken::default() }
        });
        for what in &taken.left_out {
            tracing::warn!("not kept: {what}");
        }
        (mount, taken)
    };
    tokio::task::spawn_blocking(take).await.map_err(io::Error::other)
}

/// Takes the mount away.
pub(crate) async fn unmount(mount: Mount, dirs: &Dirs) {
    let dirs = dirs.clone();
    let done = tokio::task::spawn_blocking(move || {
        let result = mount.unmount();
        dirs.unmount();
        result
    });
    match done.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "unmounting"),
        Err(error) => tracing::warn!(%error, "unmounting"),
    }
}

/// What arrives, and why it stopped to.
struct Arriving<R> {
    from: R,
    broke: Option<ClientError>,
}

impl<R: Read> Read for Arriving<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.from.read(buffer).map_err(|error| match error.downcast::<ClientError>() {
            Ok(broke) => {
                self.broke = Some(broke);
                io::ErrorKind::UnexpectedEof.into()
            }
            Err(error) => error,
        })
    }
}

/// Takes the archive apart while it arrives. One that breaks off is one that did not come: its server may have died.
fn fetch(backup: impl Read, dirs: &Dirs) -> Result<Vec<InitialFile>, MountError> {
    let mut arriving = Arriving { from: backup, broke: None };
    // Behind the archive's end the stream says that it was whole.
    let unpacked = unpack(&mut arriving, dirs).and_then(|files| io::copy(&mut arriving, &mut io::sink()).map(|_| files));
    match arriving.broke {
        Some(broke) => Err(MountError::Backup(broke)),
        None => unpacked.map_err(MountError::Unpack),
    }
}

/// Takes the archive apart: WAL goes to plain disk, all else becomes the mount's initial files.
fn unpack(backup: impl Read, dirs: &Dirs) -> io::Result<Vec<InitialFile>> {
    let mut files = vec![InitialFile { path: "pg_wal".to_owned(), mode: 0o777, content: InitialContent::Symlink(dirs.pg_wal()) }];
    let mut archive = tar::Archive::new(backup);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_str().map(str::to_owned);
        let path = path.ok_or_else(|| io::Error::other("the base backup holds a name that is no text"))?;
        let path = path.trim_start_matches("./").trim_end_matches('/').to_owned();
        let kind = entry.header().entry_type();
        let mode = entry.header().mode()? & 0o777;
        if path.is_empty() || path == "pg_wal" {
            continue;
        }
        if let Some(name) = path.strip_prefix("pg_wal/") {
            write_wal(&mut entry, name, kind.is_dir(), dirs)?;
            continue;
        }
        let content = if kind.is_dir() {
            InitialContent::Directory
        } else if kind.is_symlink() {
            let target = entry.link_name()?.map(std::borrow::Cow::into_owned);
            InitialContent::Symlink(target.ok_or_else(|| io::Error::other(format!("{path} is a link to nowhere")))?)
        } else {
            let size = entry.size();
            if size > FILE_SIZE_MAX {
                return Err(io::Error::other(format!("the base backup's file {path} has {size} bytes, more than {FILE_SIZE_MAX}")));
            }
            let mut bytes = Vec::with_capacity(size as usize);
            entry.read_to_end(&mut bytes)?;
            InitialContent::File(Bytes::from(bytes))
        };
        files.push(InitialFile { path, mode, content });
    }
    Ok(files)
}

/// A file of `pg_wal`. Segments whole, or in pieces without their pages of zeros.
fn write_wal(entry: &mut impl Read, name: &str, directory: bool, dirs: &Dirs) -> io::Result<()> {
    if name.contains("..") {
        return Err(io::Error::other(format!("the base backup holds the file pg_wal/{name}")));
    }
    let user = dirs.user();
    let path: PathBuf = dirs.pg_wal().join(name);
    if directory {
        std::fs::create_dir_all(&path)?;
        return chown(&path, Some(user.uid), Some(user.gid));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes)?;
    // Nobody makes names there but us: the folder is new, and Postgres does not run yet.
    let piece = piece_of_segment(name);
    let path = match piece {
        Some((segment, _)) => dirs.pg_wal().join(segment),
        None => path,
    };
    let file = File::options().create(true).truncate(false).create_new(piece.is_none()).write(true).open(&path)?;
    let (offset, size) = match piece {
        Some((_, offset)) => (offset, WAL_SEGMENT_SIZE),
        None => (0, bytes.len() as u64),
    };
    if offset + bytes.len() as u64 > size {
        return Err(io::Error::other(format!("the base backup's piece {name} is longer than its segment")));
    }
    file.write_all_at(&bytes, offset)?;
    file.set_len(size)?;
    if piece.is_some() {
        // Postgres goes on in it: see `wal_gate`. Not every file system can.
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    chown(&path, Some(user.uid), Some(user.gid))
}

/// Segment and offset of a piece, by its name.
fn piece_of_segment(name: &str) -> Option<(&str, u64)> {
    let (segment, offset) = name.split_once('.')?;
    let digits = |text: &str, n| text.len() == n && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if digits(segment, 24) && digits(offset, 8) { Some((segment, u64::from_str_radix(offset, 16).ok()?)) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirs::{Isolation, User};

    /// What comes before the end, which is an error.
    struct Breaks(&'static [u8], Option<io::Error>);

    impl Read for Breaks {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let read = self.0.read(buffer)?;
            match self.1.take() {
                Some(error) if read == 0 => Err(error),
                kept => {
                    self.1 = kept;
                    Ok(read)
                }
            }
        }
    }

    fn fetched(before: &'static [u8], error: io::Error) -> MountError {
        let home = tempfile::tempdir().unwrap();
        let user = User { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() };
        let dirs = Dirs::existing(home.path(), home.path(), "0123", Isolation::None(user));
        match fetch(Breaks(before, Some(error)), &dirs) {
            Err(error) => error,
            Ok(files) => panic!("{} files of an archive without an end", files.len()),
        }
    }

    #[test]
    fn pieces_of_segments_are_known_by_their_names() {
        let segment = "000000010000000000000001";
        assert_eq!(piece_of_segment(&format!("{segment}.00512000")), Some((segment, 0x51_2000)));
        for name in [segment, "00000002.history", "000000010000000000000001.0051200", "000000010000000000000001.backup00"] {
            assert_eq!(piece_of_segment(name), None, "{name}");
        }
    }

    #[test]
    fn a_base_backup_that_breaks_off_is_fetched_again() {
        let closed = || io::Error::other(ClientError::Closed { endpoint: "the page service".to_owned() });
        for before in [&b""[..], &[0; 512], &[b'x'; 100]] {
            let error = fetched(before, closed());
            assert!(error.is_transient(), "{} bytes came: {error}", before.len());
        }
        assert!(!fetched(b"", io::Error::other("a full disk")).is_transient());
    }
}
