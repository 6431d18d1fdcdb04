//! User ids of sandboxes. Each is one compute's on this machine, whichever of its hosts runs it, until the compute's
//! files are gone.
//!
//! A claim is a file in [`CLAIMS`], named by the user id, that holds the path of the host's folder. It is worth nothing
//! once that folder is gone. Claims do not outlive the machine's run, records of computes do: a host claims theirs
//! again when it starts. Who changes claims has the folder's lock.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Where claims are; the lock is a file among them.
const CLAIMS: &str = "/run/varve/uids";
const LOCK: &str = "lock";

/// Why a user id cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum UidError {
    /// There is none left.
    #[error("all user ids from {first} to {last} are taken: give more with --uids", first = .0.start, last = .0.end - 1)]
    NoneLeft(Range<u32>),
    /// Another host has it.
    #[error("user id {uid} of a compute is claimed by the host of {by}, too: give the hosts of one machine different --uids", by = .by.display())]
    Another {
        /// The user id.
        uid: u32,
        /// The other host's folder.
        by: PathBuf,
    },
    /// The file system said no.
    #[error("{CLAIMS}: {0}")]
    Io(#[from] io::Error),
}

/// The claims of one host.
#[derive(Clone, Debug)]
pub struct Uids {
    range: Range<u32>,
    host: PathBuf,
    claims: PathBuf,
}

impl Uids {
    /// For the host whose folder is `host`.
    pub fn new(range: Range<u32>, host: &Path) -> Uids {
        Uids { range, host: host.to_owned(), claims: CLAIMS.into() }
    }

    /// Claims what this host's records name, and lets go of what it claimed beside them: it was killed before it wrote
    /// the record. Blocks.
    ///
    /// # Errors
    /// [`UidError`].
    pub fn begin(&self, recorded: &[u32]) -> Result<(), UidError> {
        let _lock = self.lock()?;
        for entry in fs::read_dir(&self.claims)? {
            let uid = entry?.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(uid) = uid.filter(|uid| !recorded.contains(uid))
                && self.holder(uid)?.as_deref() == Some(&*self.host)
            {
                fs::remove_file(self.claim(uid))?;
            }
        }
        recorded.iter().try_for_each(|uid| match self.holder(*uid)? {
            Some(by) if by != self.host => Err(UidError::Another { uid: *uid, by }),
            _ => Ok(self.write(*uid)?),
        })
    }

    /// Claims one that nobody has. Blocks.
    ///
    /// # Errors
    /// [`UidError`].
    pub fn take(&self) -> Result<u32, UidError> {
        let _lock = self.lock()?;
        for uid in self.range.clone() {
            if self.holder(uid)?.is_none() {
                self.write(uid)?;
                return Ok(uid);
            }
        }
        Err(UidError::NoneLeft(self.range.clone()))
    }

    /// Lets go of one: the files of its compute are gone. Blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn release(&self, uid: u32) -> Result<(), UidError> {
        let _lock = self.lock()?;
        if self.holder(uid)?.as_deref() == Some(&*self.host) {
            fs::remove_file(self.claim(uid))?;
        }
        Ok(())
    }

    fn claim(&self, uid: u32) -> PathBuf {
        self.claims.join(uid.to_string())
    }

    /// The folder of the host that has it, if that is still there.
    fn holder(&self, uid: u32) -> io::Result<Option<PathBuf>> {
        match fs::read_to_string(self.claim(uid)) {
            Ok(path) => Ok(Some(PathBuf::from(path)).filter(|path| path.exists())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, uid: u32) -> io::Result<()> {
        fs::write(self.claim(uid), self.host.display().to_string())
    }

    fn lock(&self) -> io::Result<File> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new().recursive(true).mode(0o711).create(&self.claims)?;
        let lock = File::options().create(true).write(true).truncate(false).open(self.claims.join(LOCK))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        Ok(lock)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_hosts_have_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let host = |name: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(&path).unwrap();
            Uids { range: 100..103, host: path, claims: folder.path().join("claims") }
        };
        let (one, two) = (host("one"), host("two"));
        assert_eq!((one.take().unwrap(), two.take().unwrap(), one.take().unwrap()), (100, 101, 102));
        assert!(matches!(two.take(), Err(UidError::NoneLeft(_))));
        one.release(101).unwrap(); // not its own
        one.release(100).unwrap();
        assert_eq!(two.take().unwrap(), 100);
        // One was killed before it wrote a record of 102.
        one.begin(&[]).unwrap();
        assert_eq!(two.take().unwrap(), 102);
        assert!(matches!(one.begin(&[101]), Err(UidError::Another { uid: 101, .. })));
        // The folder of two is gone.
        fs::remove_dir(&two.host).unwrap();
        one.begin(&[101]).unwrap();
        assert_eq!(one.take().unwrap(), 100);
    }
}
