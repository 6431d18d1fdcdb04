//! What a sandbox is to be.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which network the processes of a sandbox see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkAccess {
    /// One of their own, with nothing in it but themselves. The host passes the bytes of clients in.
    #[default]
    Own,
    /// The host's: they reach what this machine reaches.
    Host,
}

impl NetworkAccess {
    /// As it stands in arguments.
    pub fn name(self) -> &'static str {
        match self {
            NetworkAccess::Own => "own",
            NetworkAccess::Host => "host",
        }
    }
}

impl FromStr for NetworkAccess {
    type Err = String;

    fn from_str(text: &str) -> Result<NetworkAccess, String> {
        match text {
            "own" => Ok(NetworkAccess::Own),
            "host" => Ok(NetworkAccess::Host),
            other => Err(format!("'{other}' is neither own nor host")),
        }
    }
}

/// What the shell of a sandbox is to be: all but what is shown in it of its compute. It is passed as an argument, so
/// there is no secret in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// User and group id of everything in the sandbox.
    pub uid: u32,
    /// A folder of the host's, on which the root directory is put together. Only the sandbox sees that.
    pub root: PathBuf,
    /// The network.
    pub network: NetworkAccess,
    /// Size of `/dev/shm`.
    pub shm_bytes: u64,
    /// Size of `/tmp`.
    pub tmp_bytes: u64,
    /// Open files of one process at most.
    pub files_max: u64,
    /// Control groups that it belongs to: their folders.
    pub cgroups: Vec<PathBuf>,
}

/// What runs in a shell, and what it sees there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Folders that are seen under the same path, and cannot be written.
    pub read_only: Vec<PathBuf>,
    /// Folders that are seen under the same path, and can be written.
    pub writable: Vec<PathBuf>,
    /// Links in the root directory: name, and where it leads.
    pub root_links: Vec<(String, String)>,
    /// Links in `/tmp` and `/dev/shm`, made as the user: path, and where it leads.
    pub links: Vec<(String, String)>,
    /// The program.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// What it reads from its standard input, as a path of the sandbox; nothing, without a file.
    pub input: Option<PathBuf>,
    /// Its environment.
    pub environment: Vec<(String, String)>,
}

impl Program {
    /// The folders that are shown, each with whether it can be written. Descriptors come in this order.
    pub(super) fn shown(&self) -> impl Iterator<Item = (&PathBuf, bool)> {
        self.read_only.iter().map(|path| (path, false)).chain(self.writable.iter().map(|path| (path, true)))
    }
}
