//! A psql that stays connected, and is sent statements one after the other.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::limit::WaitError;

/// A psql that is connected and reads statements.
#[derive(Debug)]
pub struct Session {
    process: Child,
    input: ChildStdin,
    said: Receiver<String>,
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    /// When psql cannot be run.
    pub fn open(db: &str) -> anyhow::Result<Session> {
        // What it prints and what it warns of come in one order.
        let mut psql = Command::new("sh");
        psql.args(["-c", "exec psql \"$1\" -XqAt -v VERBOSITY=terse 2>&1", "sh", db]);
        let mut process = psql.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("psql cannot be run")?;
        let input = process.stdin.take().context("a pipe")?;
        let said = lines(process.stdout.take().context("a pipe")?);
        Ok(Session { process, input, said })
    }

    /// Sends statements.
    ///
    /// # Errors
    /// When psql has ended.
    pub fn begin(&mut self, sql: &str) -> anyhow::Result<()> {
        writeln!(self.input, "{sql};\n\\echo done").context("psql takes a statement")
    }

    /// Sends statements and waits until they are over; gives what psql said.
    ///
    /// # Errors
    /// Those of [`Session::begin`] and [`Session::end`].
    pub fn run(&mut self, sql: &str, limit: Duration) -> anyhow::Result<Vec<String>> {
        self.begin(sql)?;
        self.end(limit)
    }

    /// Waits until what was begun is over; gives what psql said.
    ///
    /// # Errors
    /// When that takes longer than `limit`, or psql has ended.
    pub fn end(&mut self, limit: Duration) -> anyhow::Result<Vec<String>> {
        let deadline = Instant::now() + limit;
        let mut said = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(left) {
                Ok(line) if line == "done" => return Ok(said),
                Ok(line) => said.push(line),
                Err(_) => return Err(WaitError::new(format!("a statement of psql, which said {said:?}"), limit, None).into()),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn lines(output: ChildStdout) -> Receiver<String> {
    let (send, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    lines
}
