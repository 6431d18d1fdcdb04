//! Connections to a compute's walsender, handed out on a Unix socket.
//!
//! Anybody on the machine may connect; the credential protects. Who sends it within the time limit, as one line, gets a
//! descriptor that is connected to Postgres's private socket. All others get a line that says why not. The connections
//! that wait for their line are few: when one too many comes, the one that has waited longest is closed, so that silent
//! ones keep nobody out.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use varve_api::host::Walsender;
use varve_api::token::Token;
use varve_protocol::connect::HANDOVER_LINE_MAX;

use crate::sessions::PrivateSocket;

/// How long a client may take to send its line, and to take the answer.
const CLIENT_MAX: Duration = Duration::from_secs(5);
/// Connections that may wait at a time.
const WAITING_MAX: usize = 64;
/// Wait after a failed accept: there are no descriptors right now.
const ACCEPT_WAIT: Duration = Duration::from_millis(100);
/// Longest path of a Unix socket.
pub const SOCKET_PATH_MAX: usize = 107;

/// Why the socket is not there.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The kernel takes no such path.
    #[error("{path} is too long for a socket ({SOCKET_PATH_MAX} bytes at most): name a shorter folder with --run-dir", path = .0.display())]
    PathTooLong(PathBuf),
    /// The file system or the system said no.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The open door. It closes, and its socket goes, when this is dropped.
#[derive(Debug)]
pub struct Handover {
    path: PathBuf,
    credential: Token,
    task: JoinHandle<()>,
}

impl Handover {
    /// Hands out connections to `postgres` on a new socket `path`; the credential is random.
    ///
    /// # Errors
    /// [`HandoverError`].
    pub fn open(path: &Path, postgres: &PrivateSocket) -> Result<Handover, HandoverError> {
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(HandoverError::PathTooLong(path.to_owned()));
        }
        let failed = |source| HandoverError::Io { path: path.to_owned(), source };
        // What a process that was killed left there.
        crate::record::remove_file(path).map_err(failed)?;
        let listener = UnixListener::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).map_err(failed)?;
        let credential = Token::random().map_err(failed)?;
        let task = tokio::spawn(accept(listener, credential.clone(), postgres.clone()));
        Ok(Handover { path: path.to_owned(), credential, task })
    }

    /// Where it is and what opens it.
    pub fn walsender(&self) -> Walsender {
        Walsender { socket: self.path.display().to_string(), credential: self.credential.reveal().to_owned() }
    }
}

impl Drop for Handover {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn accept(listener: UnixListener, credential: Token, postgres: PrivateSocket) {
    let mut waiting: VecDeque<AbortHandle> = VecDeque::new();
    // Ends them when we end: a credential opens nothing once its incarnation is over.
    let mut tasks = JoinSet::new();
    loop {
        let door = match listener.accept().await {
            Ok((door, _)) => door,
            Err(error) => {
                tracing::warn!(%error, "no connection to the walsender can be taken right now");
                tokio::time::sleep(ACCEPT_WAIT).await;
                continue;
            }
        };
        while tasks.try_join_next().is_some() {}
        waiting.retain(|handle| !handle.is_finished());
        if waiting.len() == WAITING_MAX
            && let Some(longest) = waiting.pop_front()
        {
            longest.abort();
        }
        let (credential, postgres) = (credential.clone(), postgres.clone());
        let task = tasks.spawn(async move {
            let mut door = door;
            match tokio::time::timeout(CLIENT_MAX, serve(&mut door, &credential, &postgres)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a connection to the walsender was not handed over"),
                Err(_) => say(&mut door, "no credential came in time").await,
            }
        });
        waiting.push_back(task);
    }
}

async fn serve(door: &mut UnixStream, credential: &Token, postgres: &PrivateSocket) -> io::Result<()> {
    let Some(line) = read_line(door).await? else {
        say(door, "expected one line with the credential").await;
        return Ok(());
    };
    if !credential.is(&line) {
        tracing::warn!("somebody asked for the walsender with a wrong credential");
        say(door, "wrong credential").await;
        return Ok(());
    }
    match postgres.connect() {
        Ok(stream) => {
            door.async_io(Interest::WRITABLE, || {
                let descriptors = [stream.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                    return Err(io::ErrorKind::OutOfMemory.into());
                }
                sendmsg(&*door, &[IoSlice::new(b"\n")], &mut ancillary, SendFlags::NOSIGNAL)?;
                Ok(())
            })
            .await
        }
        Err(error) => {
            say(door, &format!("Postgres takes no connection: {error}")).await;
            Err(error)
        }
    }
}

/// The client's line without its end; none where it is too long or broke off.
async fn read_line(door: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut line = vec![0; HANDOVER_LINE_MAX];
    let mut filled = 0;
    while filled < line.len() {
        let n = door.read(&mut line[filled..]).await?;
        if n == 0 {
            return Ok(None);
        }
        if let Some(end) = line[filled..filled + n].iter().position(|byte| *byte == b'\n') {
            line.truncate(filled + end);
            return Ok(Some(line));
        }
        filled += n;
    }
    Ok(None)
}

async fn say(door: &mut UnixStream, reason: &str) {
    // Who is gone, or takes nothing, is not told.
    let _ = tokio::time::timeout(CLIENT_MAX, door.write_all(format!("{reason}\n").as_bytes())).await;
}
