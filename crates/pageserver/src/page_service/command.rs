//! The commands of the page service, parsed.

use varve_postgres::Lsn;
use varve_postgres::lsn::ParseLsnError;
use varve_protocol::Version;
use varve_protocol::wire::{ServerMessage, backend::sqlstate};

use super::BackupOptions;

/// Most bytes of a tenant's or timeline's name or id in a command.
const NAME_SIZE_MAX: usize = 256;

/// What a client may ask for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// `pagestream_v3 <tenant> <timeline>`, or `pagestream_v2` likewise
    PageStream {
        /// Which form its messages have.
        version: Version,
        /// The tenant, by id or name.
        tenant: String,
        /// The timeline, by id or by its branch's name.
        timeline: String,
    },
    /// `lease lsn <tenant> <timeline> <lsn>`: the position stays readable for a while, whatever the tenant's window is.
    Lease {
        /// The tenant, by id or name.
        tenant: String,
        /// The timeline, by id or by its branch's name.
        timeline: String,
        /// The position.
        lsn: Lsn,
    },
    /// `basebackup <tenant> <timeline> [<lsn>|latest] [--gzip] [--replica] [--no-slru] [--newest-files] [--short-wal]`,
    /// or `fullbackup` likewise. A replica is given what any other server is: it is not told apart.
    Backup {
        /// The tenant, by id or name.
        tenant: String,
        /// The timeline, by id or by its branch's name.
        timeline: String,
        /// The moment; the newest if none.
        lsn: Option<Lsn>,
        /// Compressed.
        gzip: bool,
        /// What it holds.
        options: BackupOptions,
    },
    /// `SET ...`, which some drivers send when they connect; there is nothing to set.
    Set,
    /// Nothing.
    Empty,
}

impl Command {
    /// The command that `text` is.
    ///
    /// # Errors
    /// What to tell the client.
    pub fn parse(text: &str) -> Result<Command, ServerMessage> {
        let mut words = text.trim().trim_end_matches(';').split_ascii_whitespace();
        let Some(verb) = words.next() else { return Ok(Command::Empty) };
        let command = match verb {
            "pagestream_v3" | "pagestream_v2" => Command::PageStream {
                version: if verb == "pagestream_v2" { Version::V2 } else { Version::V3 },
                tenant: take_name(&mut words, verb, "tenant")?,
                timeline: take_name(&mut words, verb, "timeline")?,
            },
            "lease" => {
                if words.next() != Some("lsn") {
                    return Err(syntax("lease: write lease lsn <tenant> <timeline> <lsn>".to_owned()));
                }
                let (tenant, timeline) = (take_name(&mut words, "lease lsn", "tenant")?, take_name(&mut words, "lease lsn", "timeline")?);
                let lsn =
                    words.next().ok_or_else(|| syntax("lease lsn needs a tenant, a timeline and an LSN: the LSN is missing".to_owned()))?;
                Command::Lease { tenant, timeline, lsn: parse_lsn(lsn)? }
            }
            "basebackup" | "fullbackup" => Self::parse_backup(verb, &mut words)?,
            _ if verb.eq_ignore_ascii_case("set") => return Ok(Command::Set),
            _ => {
                return Err(syntax(format!(
                    "unknown command '{}': the page service knows pagestream_v3 <tenant> <timeline>, pagestream_v2 likewise, \
                     lease lsn <tenant> <timeline> <lsn>, basebackup <tenant> <timeline> [<lsn>|latest] [--gzip] [--replica] [--no-slru] \
                     [--newest-files] [--short-wal] and fullbackup likewise; for SQL, connect to a compute",
                    cut(verb)
                )));
            }
        };
        match words.next() {
            None => Ok(command),
            Some(extra) => Err(syntax(format!("{verb}: '{}' is one word too many", cut(extra)))),
        }
    }

    fn parse_backup<'a>(verb: &str, words: &mut impl Iterator<Item = &'a str>) -> Result<Command, ServerMessage> {
        let tenant = take_name(words, verb, "tenant")?;
        let timeline = take_name(words, verb, "timeline")?;
        let (mut lsn, mut gzip, mut is_moment_given) = (None, false, false);
        let mut options = BackupOptions { full: verb == "fullbackup", no_slru: false, newest_files: false, short_wal: false };
        for word in words {
            match word {
                "--gzip" => gzip = true,
                "--replica" => {}
                "--no-slru" => options.no_slru = true,
                "--newest-files" => options.newest_files = true,
                "--short-wal" => options.short_wal = true,
                _ if word.starts_with('-') => return Err(syntax(format!("{verb}: unknown option '{}'", cut(word)))),
                _ if is_moment_given => return Err(syntax(format!("{verb}: '{}' is one word too many", cut(word)))),
                "latest" => is_moment_given = true,
                _ => (lsn, is_moment_given) = (Some(parse_lsn(word)?), true),
            }
        }
        Ok(Command::Backup { tenant, timeline, lsn, gzip, options })
    }
}

fn parse_lsn(word: &str) -> Result<Lsn, ServerMessage> {
    word.parse().map_err(|error: ParseLsnError| ServerMessage::error(sqlstate::INVALID_PARAMETER_VALUE, error.to_string()))
}

fn take_name<'a>(words: &mut impl Iterator<Item = &'a str>, verb: &str, what: &str) -> Result<String, ServerMessage> {
    match words.next() {
        Some(name) if name.len() <= NAME_SIZE_MAX => Ok(name.to_owned()),
        Some(name) => Err(syntax(format!("{verb}: a {what} of {} bytes is longer than the {NAME_SIZE_MAX} that are allowed", name.len()))),
        None => Err(syntax(format!("{verb} needs a tenant and a timeline: the {what} is missing"))),
    }
}

fn syntax(message: String) -> ServerMessage {
    ServerMessage::error(sqlstate::SYNTAX_ERROR, message)
}

fn cut(word: &str) -> String {
    word.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_understood() {
        let stream = Command::PageStream { version: Version::V3, tenant: "acme".into(), timeline: "main".into() };
        assert_eq!(Command::parse("pagestream_v3 acme main"), Ok(stream.clone()));
        assert_eq!(Command::parse("  pagestream_v3  acme\tmain ;"), Ok(stream));
        let backup = |lsn, gzip, full, no_slru| {
            let options = BackupOptions { full, no_slru, newest_files: false, short_wal: false };
            Ok(Command::Backup { tenant: "a".into(), timeline: "m".into(), lsn, gzip, options })
        };
        assert_eq!(Command::parse("basebackup a m"), backup(None, false, false, false));
        assert_eq!(Command::parse("basebackup a m 0/16B3748 --gzip"), backup(Some(Lsn(0x16B_3748)), true, false, false));
        assert_eq!(Command::parse("basebackup a m --no-slru 0/28"), backup(Some(Lsn(0x28)), false, false, true));
        assert_eq!(Command::parse("basebackup a m latest --replica"), backup(None, false, false, false));
        let old = Command::PageStream { version: Version::V2, tenant: "acme".into(), timeline: "main".into() };
        assert_eq!(Command::parse("pagestream_v2 acme main"), Ok(old));
        let lease = Command::Lease { tenant: "a".into(), timeline: "m".into(), lsn: Lsn(0x28) };
        assert_eq!(Command::parse("lease lsn a m 0/28"), Ok(lease));
        assert_eq!(Command::parse("fullbackup a m"), backup(None, false, true, false));
        assert_eq!(Command::parse("SET datestyle TO 'ISO'"), Ok(Command::Set));
        assert_eq!(Command::parse(" ;"), Ok(Command::Empty));
    }

    #[test]
    fn what_is_not_understood_is_told_why() {
        for (text, why) in [
            ("SELECT 1", "unknown command 'SELECT'"),
            ("pagestream_v1 a m", "unknown command 'pagestream_v1'"),
            ("lease a m 0/1", "write lease lsn"),
            ("lease lsn a m", "the LSN is missing"),
            ("basebackup a m latest 0/2", "'0/2' is one word too many"),
            ("pagestream_v3", "the tenant is missing"),
            ("pagestream_v3 a", "the timeline is missing"),
            ("pagestream_v3 a m x", "'x' is one word too many"),
            ("basebackup a m 0/1 0/2", "'0/2' is one word too many"),
            ("basebackup a m zero", "'zero' is not an LSN"),
            ("basebackup a m --lz4", "unknown option '--lz4'"),
        ] {
            let error = Command::parse(text).expect_err(text);
            assert!(error.message.contains(why), "{text}: expected '{why}' in '{}'", error.message);
        }
        assert!(Command::parse(&format!("pagestream_v3 {} m", "a".repeat(300))).is_err());
    }
}
