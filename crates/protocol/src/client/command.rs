//! The commands of the page service, as text, and base backups on a plain thread.

use std::io::{self, Read};
use std::time::Duration;

use bytes::{Buf, Bytes};
use varve_postgres::Lsn;

use crate::connect::{ClientError, ConnectConfig, blocking::Connection};
use crate::wire::BackendMessage;

/// What a base backup holds and how it comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BaseBackupOptions {
    /// Compressed with gzip.
    pub gzip: bool,
    /// With all relations (`fullbackup`) rather than only what a lazily cloned directory needs at once.
    pub full: bool,
    /// Without SLRU segments, which the client reads one by one.
    pub no_slru: bool,
    /// With the newest versions of files that have no WAL, though they were written behind the last record: for whoever
    /// goes on at head. Otherwise they are those of the moment.
    pub newest_files: bool,
    /// WAL segments without their pages of zeros, which are nearly all of a backup that is to go on from one
    /// checkpoint: as pieces `<segment>.<offset, 8 hexadecimal digits>`, at least one of each. The reader puts them
    /// together and gives the segments their size.
    pub short_wal: bool,
}

/// `pagestream_v3 <tenant> <timeline>`.
pub(super) fn pagestream(tenant: &str, timeline: &str) -> String {
    format!("pagestream_v3 {tenant} {timeline}")
}

/// `basebackup <tenant> <timeline> [<lsn>] [--gzip] [--no-slru] [--newest-files] [--short-wal]`, or `fullbackup`.
pub(super) fn base_backup(tenant: &str, timeline: &str, lsn: Option<Lsn>, options: BaseBackupOptions) -> String {
    let mut command = format!("{} {tenant} {timeline}", if options.full { "fullbackup" } else { "basebackup" });
    if let Some(lsn) = lsn {
        command.push_str(&format!(" {lsn}"));
    }
    if options.gzip {
        command.push_str(" --gzip");
    }
    if options.no_slru {
        command.push_str(" --no-slru");
    }
    if options.newest_files {
        command.push_str(" --newest-files");
    }
    if options.short_wal {
        command.push_str(" --short-wal");
    }
    command
}

/// A base backup as it arrives, to be read like a file: a tar archive, or one in gzip. The end of the file is the end
/// of a whole backup; a backup that breaks off is an error.
pub struct BaseBackup {
    connection: Connection,
    chunk: Bytes,
    complete: bool,
}

impl BaseBackup {
    /// Asks for a base backup. `timeout` is for the connection and for each silence of the server's afterwards.
    ///
    /// # Errors
    /// [`ClientError`] says why there is none.
    pub fn start(
        config: &ConnectConfig,
        tenant: &str,
        timeline: &str,
        lsn: Option<Lsn>,
        options: BaseBackupOptions,
        timeout: Duration,
    ) -> Result<BaseBackup, ClientError> {
        let mut connection = Connection::connect(config, timeout)?;
        connection.set_read_timeout(Some(timeout))?;
        connection.start_copy(&base_backup(tenant, timeline, lsn, options))?;
        Ok(BaseBackup { connection, chunk: Bytes::new(), complete: false })
    }

    fn next_chunk(&mut self) -> Result<(), ClientError> {
        match self.connection.message()? {
            BackendMessage::CopyData(chunk) => self.chunk = chunk,
            BackendMessage::CopyDone => self.complete = true,
            BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => {}
            BackendMessage::ErrorResponse(error) => return Err(self.connection.server_error(error)),
            other => return Err(self.connection.unexpected("a base backup's bytes", &other)),
        }
        Ok(())
    }
}

impl Read for BaseBackup {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() && !self.complete && !buf.is_empty() {
            self.next_chunk().map_err(io::Error::other)?;
        }
        let n = buf.len().min(self.chunk.len());
        self.chunk.copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_read_as_the_page_service_expects_them() {
        assert_eq!(pagestream("acme", "main"), "pagestream_v3 acme main");
        assert_eq!(base_backup("acme", "main", None, BaseBackupOptions::default()), "basebackup acme main");
        let all = BaseBackupOptions { gzip: true, full: false, no_slru: true, newest_files: true, short_wal: true };
        assert_eq!(base_backup("a", "m", Some(Lsn(0x1_0000_0028)), all), "basebackup a m 1/28 --gzip --no-slru --newest-files --short-wal");
        let full = BaseBackupOptions { full: true, ..BaseBackupOptions::default() };
        assert_eq!(base_backup("a", "m", Some(Lsn(0x28)), full), "fullbackup a m 0/28");
    }
}
