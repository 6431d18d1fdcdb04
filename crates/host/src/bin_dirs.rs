//! The Postgres installations of this machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use varve_postgres::Major;

/// Where Debian puts the majors.
const DEBIAN: &str = "/usr/lib/postgresql";

/// Why there is no usable Postgres in a folder.
#[derive(Debug, thiserror::Error)]
pub enum BinDirError {
    /// This version of Varve does not know that major.
    #[error("PostgreSQL {0} is not supported: 14 to 18 are")]
    Unknown(u32),
    /// There is no server in the folder.
    #[error("there is no PostgreSQL here: {path} does not exist; install it, or name its folder with --pg-bin-dir", path = .0.display())]
    Missing(PathBuf),
    /// The server does not say its version.
    #[error("{path} does not run ({source}); install it anew, or name another folder with --pg-bin-dir", path = .path.display())]
    DoesNotRun {
        /// The program.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The server is another major.
    #[error("{path} is {version}, expected PostgreSQL {expected}; name the right folder with --pg-bin-dir", path = .path.display())]
    Other {
        /// The program.
        path: PathBuf,
        /// The major that it should be.
        expected: u32,
        /// What it says of itself.
        version: String,
    },
}

/// A Postgres that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Its major.
    pub major: Major,
    /// Its full version, such as `15.20`.
    pub version: String,
    /// Folder of its programs.
    pub bin_dir: PathBuf,
}

/// Finds the folder of a major's programs: the one that was named, or Debian's.
#[derive(Clone, Debug, Default)]
pub struct BinDirs {
    named: Vec<(u32, PathBuf)>,
}

impl BinDirs {
    /// With the folders that an operator named.
    pub fn new(named: Vec<(u32, PathBuf)>) -> BinDirs {
        BinDirs { named }
    }

    /// What the operator named, each as `15=/folder`.
    pub fn arguments(&self) -> impl Iterator<Item = String> + '_ {
        self.named.iter().map(|(major, path)| format!("{major}={}", path.display()))
    }

    /// Where the programs of a major should be.
    pub fn path(&self, major: u32) -> PathBuf {
        let named = self.named.iter().find(|(number, _)| *number == major).map(|(_, path)| path.clone());
        named.unwrap_or_else(|| Path::new(DEBIAN).join(major.to_string()).join("bin"))
    }

    /// Asks the server of a major which version it is.
    ///
    /// # Errors
    /// When there is none, or another one.
    pub fn find(&self, major: u32) -> Result<Installed, BinDirError> {
        let known = Major::from_number(major).ok_or(BinDirError::Unknown(major))?;
        let bin_dir = self.path(major);
        let path = bin_dir.join("postgres");
        if !path.is_file() {
            return Err(BinDirError::Missing(path));
        }
        let output = Command::new(&path).arg("--version").stdin(Stdio::null()).output();
        let output = output.map_err(|source| BinDirError::DoesNotRun { path: path.clone(), source })?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match version(&said) {
            Some((number, version)) if number == major => Ok(Installed { major: known, version: version.to_owned(), bin_dir }),
            Some((_, version)) => Err(BinDirError::Other { path, expected: major, version: format!("PostgreSQL {version}") }),
            None => Err(BinDirError::Other { path, expected: major, version: format!("'{}'", said.chars().take(100).collect::<String>()) }),
        }
    }

    /// What is wrong with what is there, for people: a folder that holds another major, a program that does not run.
    pub fn problems(&self) -> Vec<String> {
        let problem = |major: &Major| match self.find(major.number()) {
            Ok(_) => None,
            // A major that nobody named need not be here.
            Err(BinDirError::Missing(_)) if self.named.iter().all(|(named, _)| *named != major.number()) => None,
            Err(error) => Some(error.to_string()),
        };
        Major::ALL.iter().filter_map(problem).collect()
    }

    /// All that are there, the oldest first.
    pub fn installed(&self) -> Vec<Installed> {
        Major::ALL.iter().filter_map(|major| self.find(major.number()).ok()).collect()
    }
}

/// Major and full version of `postgres (PostgreSQL) 15.18 (Debian ...)`.
fn version(said: &str) -> Option<(u32, &str)> {
    let version = said.split_whitespace().nth(2)?;
    let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    Some((version[..digits].parse().ok()?, version))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn versions_are_read_as_postgres_prints_them() {
        assert_eq!(version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"), Some((15, "15.18")));
        assert_eq!(version("postgres (PostgreSQL) 18beta1"), Some((18, "18beta1")));
        assert_eq!(version("postgres (PostgreSQL) 17devel"), Some((17, "17devel")));
        assert_eq!(version("something else"), None);
        assert_eq!(version(""), None);
    }

    #[test]
    fn a_folder_of_another_major_is_refused_by_what_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let dirs = BinDirs::new(vec![(16, folder.path().to_owned())]);
        assert!(matches!(dirs.find(16), Err(BinDirError::Missing(_))));
        let program = folder.path().join("postgres");
        std::fs::write(&program, "#!/bin/sh\necho 'postgres (PostgreSQL) 17.1'\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(dirs.find(16), Err(BinDirError::Other { expected: 16, .. })));
        assert!(matches!(dirs.find(9), Err(BinDirError::Unknown(9))));
        let dirs = BinDirs::new(vec![(17, folder.path().to_owned())]);
        assert_eq!(dirs.find(17).unwrap().version, "17.1");
    }
}
