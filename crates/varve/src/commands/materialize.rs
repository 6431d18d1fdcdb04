//! `varve materialize`: a plain data directory of a moment, for hosts without FUSE and for leaving.

use std::io::Read;
use std::os::unix::fs::{DirBuilderExt as _, lchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use varve_api::admin::{Branch, BranchMoment, Server};
use varve_host::dirs::User;
use varve_protocol::client::{BaseBackup, BaseBackupOptions};
use varve_protocol::connect::{ConnectConfig, Endpoint};

use super::BranchPath;
use super::branch::MomentArgs;
use crate::client::{Client, segment};
use crate::output;

/// How long the server may be silent while the backup comes.
const SILENCE_MAX: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
pub(crate) struct MaterializeArgs {
    /// The branch, as tenant/branch.
    branch: BranchPath,
    /// The data directory to make; it must not exist, or be empty.
    folder: PathBuf,
    #[command(flatten)]
    moment: MomentArgs,
}

pub(crate) async fn run(args: MaterializeArgs, client: &Client, json: bool) -> anyhow::Result<()> {
    let MaterializeArgs { branch, folder, moment } = args;
    if std::fs::read_dir(&folder).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{} is not empty: name a new folder", folder.display());
    }
    let server: Server = client.get("server").await?;
    let found: Branch = client.get(&branch.api()).await?;
    let mut path = format!("{}/moment", branch.api());
    match (&moment.lsn, &moment.at) {
        (Some(lsn), _) => path.push_str(&format!("?lsn={}", segment(lsn))),
        (None, Some(at)) => path.push_str(&format!("?at={}", segment(at))),
        (None, None) => {}
    }
    let newest_files = moment.lsn.as_deref().is_none_or(|lsn| lsn == "head") && moment.at.is_none();
    let moment: BranchMoment = client.get(&path).await?;
    let (host, port) = server.page_service.rsplit_once(':').context("the server names no page service")?;
    let connection = ConnectConfig::new(Endpoint::tcp(host, port.parse::<u16>()?), "varve");
    let lsn = moment.lsn.parse()?;
    let target = folder.clone();
    let bytes = tokio::task::spawn_blocking(move || -> anyhow::Result<u64> {
        let options = BaseBackupOptions { full: true, newest_files, ..BaseBackupOptions::default() };
        let backup = BaseBackup::start(&connection, &branch.tenant, &found.timeline_id, Some(lsn), options, SILENCE_MAX)?;
        unpack(backup, &target, found.size_bytes.unwrap_or(0))
    })
    .await??;
    output::print(json, &json!({ "folder": folder, "lsn": moment.lsn, "bytes": bytes }), || {
        format!("{} holds {}, at {}: start it with postgres -D", folder.display(), output::bytes(bytes), moment.lsn)
    })
}

/// Counts what is read, and shows it.
struct Progress<R> {
    inner: R,
    bar: ProgressBar,
}

impl<R: Read> Read for Progress<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.bar.inc(n as u64);
        Ok(n)
    }
}

fn unpack(backup: impl Read, folder: &Path, size_hint: u64) -> anyhow::Result<u64> {
    let cannot = || format!("cannot write into {}", folder.display());
    std::fs::DirBuilder::new().mode(0o700).recursive(true).create(folder).with_context(cannot)?;
    let bar = ProgressBar::with_draw_target(Some(size_hint), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{bytes} of about {total_bytes} [{wide_bar}] {bytes_per_sec}")?);
    let mut archive = tar::Archive::new(Progress { inner: backup, bar: bar.clone() });
    archive.set_preserve_permissions(true);
    archive.unpack(folder).with_context(cannot)?;
    bar.finish_and_clear();
    let user = User::for_postgres();
    if let (true, Ok(user)) = (rustix::process::geteuid().is_root(), user) {
        give_to(folder, user).with_context(cannot)?;
    }
    Ok(bar.position())
}

/// Postgres runs as a user that is not root, and wants to own its data directory.
fn give_to(path: &Path, user: User) -> std::io::Result<()> {
    lchown(path, Some(user.uid), Some(user.gid))?;
    if std::fs::symlink_metadata(path)?.is_dir() {
        for entry in std::fs::read_dir(path)? {
            give_to(&entry?.path(), user)?;
        }
    }
    Ok(())
}
