//! `varve branch`.

use std::collections::{BTreeMap, BTreeSet};

use clap::{Args, Subcommand};
use reqwest::Method;
use varve_api::admin::{Branch, BranchChange, BranchMoment, NewBranch, Restore, Restored};

use super::BranchPath;
use crate::client::{Client, ListArgs, segment};
use crate::output;
use crate::progress::spinner;

/// A moment of a branch.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub(crate) struct MomentArgs {
    /// An LSN such as 0/16B3748 (rounded down to a record's end), or head.
    #[arg(long)]
    pub(crate) lsn: Option<String>,
    /// A time (RFC 3339), as Postgres's recovery_target_time means it.
    #[arg(long)]
    pub(crate) at: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BranchCommand {
    /// Create a branch: a pointer, whatever the database's size.
    Create {
        /// The new branch, as tenant/branch.
        branch: BranchPath,
        /// The branch to start from; main by default.
        #[arg(long)]
        from: Option<String>,
        #[command(flatten)]
        moment: MomentArgs,
        /// The snapshot to start from, instead of a branch.
        #[arg(long, conflicts_with_all = ["from", "lsn", "at"])]
        snapshot: Option<String>,
    },
    /// List a tenant's branches as a tree.
    List {
        /// The tenant.
        tenant: String,
        #[command(flatten)]
        list: ListArgs,
    },
    /// Show a branch.
    Show {
        /// The branch, as tenant/branch.
        branch: BranchPath,
    },
    /// Give a branch another name.
    Rename {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        /// Its new name.
        name: String,
    },
    /// Delete a branch: its compute ends, and what no other branch needs of its history goes for good.
    Delete {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Take a branch back to a moment; the old history stays as another branch, a running compute comes back by itself.
    Restore {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        #[command(flatten)]
        moment: MomentArgs,
        /// The snapshot to go back to.
        #[arg(long, conflicts_with_all = ["lsn", "at"])]
        snapshot: Option<String>,
    },
    /// Say which LSN a time is, or which time an LSN.
    Moment {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        #[command(flatten)]
        moment: MomentArgs,
    },
}

fn came_from(branch: &Branch) -> String {
    match (&branch.parent, &branch.branch_lsn) {
        (Some(parent), Some(lsn)) => format!("{parent} at {lsn}"),
        (None, Some(lsn)) => format!("a history without a name, at {lsn}"),
        _ => "nothing".to_owned(),
    }
}

fn describe(b: &Branch) -> String {
    let mut text = format!(
        "branch     {}/{}\ntimeline   {} (TLI {})\nfrom       {}\nearliest   {}\nhead       {}\nsize       {}\ncreated    {}\ncompute    {}",
        b.tenant,
        b.name,
        b.timeline_id,
        b.tli,
        came_from(b),
        b.earliest_lsn,
        b.last_lsn,
        b.size_bytes.map_or_else(|| "not known".to_owned(), output::bytes),
        b.created_at,
        b.compute.as_deref().unwrap_or("none")
    );
    if let Some(reason) = &b.stopped {
        text += &format!("\nstopped    {reason}");
    }
    text
}

/// Generations of branches that are indented, each more than the one before.
const INDENTED_MAX: usize = 12;

/// Rows of the branches, children indented below their parents.
fn tree(branches: &[Branch]) -> Vec<Vec<String>> {
    let names: BTreeSet<&str> = branches.iter().map(|branch| branch.name.as_str()).collect();
    let mut children: BTreeMap<Option<&str>, Vec<&Branch>> = BTreeMap::new();
    for branch in branches {
        let parent = branch.parent.as_deref().filter(|parent| names.contains(parent));
        children.entry(parent).or_default().push(branch);
    }
    let mut rows = Vec::new();
    let mut stack: Vec<(usize, &Branch)> = children.remove(&None).unwrap_or_default().into_iter().rev().map(|b| (0, b)).collect();
    while let Some((depth, b)) = stack.pop() {
        rows.push(vec![
            // A chain of a thousand would be a staircase; the next column has the parent's name.
            format!("{}{}", "  ".repeat(depth.min(INDENTED_MAX)), b.name),
            b.parent.clone().unwrap_or_default(),
            b.branch_lsn.clone().unwrap_or_default(),
            b.last_lsn.clone(),
            b.size_bytes.map(output::bytes).unwrap_or_default(),
            output::age(&b.created_at),
            if b.compute.is_some() { "running".to_owned() } else { String::new() },
        ]);
        let below = children.remove(&Some(b.name.as_str())).unwrap_or_default();
        stack.extend(below.into_iter().rev().map(|child| (depth + 1, child)));
    }
    rows
}

pub(crate) async fn run(command: BranchCommand, client: &Client, json: bool) -> anyhow::Result<()> {
    match command {
        BranchCommand::Create { branch, from, moment, snapshot } => {
            let body = NewBranch { name: branch.branch.clone(), from, lsn: moment.lsn, at: moment.at, snapshot };
            let created: Branch = client.post(&format!("tenants/{}/branches", segment(&branch.tenant)), &body).await?;
            output::print(json, &created, || format!("branch {branch} from {}", came_from(&created)))
        }
        BranchCommand::List { tenant, list } => {
            let branches: Vec<Branch> = client.list(&format!("tenants/{}/branches", segment(&tenant)), &list).await?;
            output::print(json, &branches, || {
                output::table(&["BRANCH", "PARENT", "AT", "HEAD", "SIZE", "AGE", "COMPUTE"], &tree(&branches))
            })
        }
        BranchCommand::Show { branch } => {
            let found: Branch = client.get(&branch.api()).await?;
            output::print(json, &found, || describe(&found))
        }
        BranchCommand::Rename { branch, name } => {
            let renamed: Branch = client.call(Method::PATCH, &branch.api(), Some(&BranchChange { name })).await?;
            output::print(json, &renamed, || format!("branch {branch} is now {}/{}", renamed.tenant, renamed.name))
        }
        BranchCommand::Delete { branch, yes } => {
            if !yes {
                let found: Branch = client.get(&branch.api()).await?;
                let runs = if found.compute.is_some() { ", end its compute," } else { "" };
                output::confirm(&format!(
                    "Delete branch {branch}{runs} and give up what only it has of its history (to {})?",
                    found.last_lsn
                ))?;
            }
            let answer: serde_json::Value = client.call(Method::DELETE, &branch.api(), None::<&()>).await?;
            output::print(json, &answer, || format!("branch {branch} is deleted"))
        }
        BranchCommand::Restore { branch, moment, snapshot } => {
            let body = Restore { lsn: moment.lsn, at: moment.at, snapshot };
            let path = format!("{}/restore", branch.api());
            let restored: Restored = spinner("restoring", client.post(&path, &body)).await?;
            output::print(json, &restored, || {
                format!(
                    "{branch} is back at {}; what came after is {}/{}",
                    restored.branch.branch_lsn.as_deref().unwrap_or_default(),
                    restored.before.tenant,
                    restored.before.name
                )
            })
        }
        BranchCommand::Moment { branch, moment } => {
            let mut path = format!("{}/moment", branch.api());
            match (moment.lsn, moment.at) {
                (Some(lsn), _) => path.push_str(&format!("?lsn={}", segment(&lsn))),
                (None, Some(at)) => path.push_str(&format!("?at={}", segment(&at))),
                (None, None) => {}
            }
            let found: BranchMoment = client.get(&path).await?;
            output::print(json, &found, || format!("{}  {}", found.lsn, found.time.as_deref().unwrap_or("before any commit")))
        }
    }
}
