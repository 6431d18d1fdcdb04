//! The file system as the WAL log uses it, so that tests can tear writes, fail fsyncs and fill the disk.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One preallocated file.
pub trait LogFile: Send + Sync + fmt::Debug {
    /// Writes all of `bytes` at `offset`, within the file's size.
    ///
    /// # Errors
    /// Those of the file system.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Reads exactly `bytes.len()` bytes at `offset`.
    ///
    /// # Errors
    /// Those of the file system; `UnexpectedEof` when the file is shorter.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Makes everything written durable (`fdatasync`).
    ///
    /// # Errors
    /// Those of the file system; what was written since the last success may then be lost, even if a later call
    /// succeeds.
    fn sync(&self) -> io::Result<()>;
}

/// A folder of such files.
pub trait LogDisk: Send + Sync + fmt::Debug {
    /// Makes a file of `size` zero bytes, all allocated and durable, under `name`.
    ///
    /// # Errors
    /// Those of the file system.
    fn create(&self, name: &str, size: u64) -> io::Result<Arc<dyn LogFile>>;

    /// Opens a file.
    ///
    /// # Errors
    /// Those of the file system.
    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>>;

    /// Durably gives a file another name.
    ///
    /// # Errors
    /// Those of the file system.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Durably removes a file.
    ///
    /// # Errors
    /// Those of the file system.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Names of all files.
    ///
    /// # Errors
    /// Those of the file system.
    fn list(&self) -> io::Result<Vec<String>>;

    /// The folder, for people.
    fn describe(&self) -> String;
}

/// A folder of the operating system.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// The folder at `path`, which is made if missing.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(path: &Path) -> io::Result<Folder> {
        std::fs::create_dir_all(path)?;
        Ok(Folder { path: path.to_owned() })
    }

    fn sync_folder(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

#[derive(Debug)]
struct OsFile(File);

impl LogFile for OsFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// Makes a file of zeros, durably. Written, not merely allocated: an fsync must not have to convert extents.
fn zeros(path: &Path, size: u64) -> io::Result<File> {
    static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
    let file = File::options().create(true).truncate(true).read(true).write(true).open(path)?;
    let mut at = 0;
    while at < size {
        let n = (size - at).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..n as usize], at)?;
        at += n;
    }
    file.sync_all()?;
    Ok(file)
}

impl LogDisk for Folder {
    fn create(&self, name: &str, size: u64) -> io::Result<Arc<dyn LogFile>> {
        let temporary = self.path.join(format!("{name}.new"));
        let file = zeros(&temporary, size).inspect_err(|_| {
            // On a full disk it has taken what was left.
            let _ = std::fs::remove_file(&temporary);
        })?;
        std::fs::rename(temporary, self.path.join(name))?;
        self.sync_folder()?;
        Ok(Arc::new(OsFile(file)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        Ok(Arc::new(OsFile(File::options().read(true).write(true).open(self.path.join(name))?)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))?;
        self.sync_folder()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))?;
        self.sync_folder()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            names.extend(entry?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }

    fn describe(&self) -> String {
        self.path.display().to_string()
    }
}
