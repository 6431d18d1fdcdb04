//! The host's token in a file that only its owner can read.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, ensure};
use varve_api::token::Token;

/// The token in the file `path`; a new one is put there if there is none.
pub(crate) fn ensure_token(path: &Path) -> anyhow::Result<Token> {
    let name = path.display();
    match File::options().write(true).create_new(true).mode(0o600).open(path) {
        Ok(mut file) => {
            let token = Token::random().context("no random numbers")?;
            writeln!(file, "{}", token.reveal()).and_then(|()| file.sync_all()).with_context(|| format!("cannot write {name}"))?;
            Ok(token)
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => read_token(path),
        Err(error) => Err(error).with_context(|| format!("cannot make {name}")),
    }
}

/// The token in the file `path`, which nobody else may be able to read.
pub(crate) fn read_token(path: &Path) -> anyhow::Result<Token> {
    let name = path.display();
    let mut file = File::open(path).with_context(|| format!("cannot read the token file {name}"))?;
    let mode = file.metadata().with_context(|| format!("cannot look at {name}"))?.mode();
    ensure!(mode & 0o077 == 0, "others can read or write {name}, which holds a token: chmod 600 {name}");
    let mut text = String::new();
    file.read_to_string(&mut text).with_context(|| format!("cannot read the token file {name}"))?;
    Token::parse(&text).with_context(|| format!("{name} holds no token; remove it to get a new one"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_token_is_made_once_and_belongs_to_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host-token");
        let token = ensure_token(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(ensure_token(&path).unwrap(), token);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = ensure_token(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
        assert!(read_token(&folder.path().join("none")).is_err());
    }
}
