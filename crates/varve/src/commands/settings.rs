//! `varve settings`.

use clap::Subcommand;
use reqwest::Method;
use varve_api::admin::{Settings, SettingsChange};

use super::BranchPath;
use crate::client::Client;
use crate::output;

/// A setting as a person writes it: `name=value`.
#[derive(Clone, Debug)]
pub(crate) struct NameValue {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl std::str::FromStr for NameValue {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, value)) if !name.trim().is_empty() => {
                Ok(NameValue { name: name.trim().to_owned(), value: value.trim().to_owned() })
            }
            _ => Err(format!("'{text}' is no setting: write name=value, such as work_mem=16MB")),
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum SettingsCommand {
    /// List what ALTER SYSTEM or this command has set.
    List {
        /// The branch, as tenant/branch.
        branch: BranchPath,
    },
    /// Set settings: the next start has them.
    Set {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        /// Each as name=value.
        #[arg(required = true, value_name = "NAME=VALUE")]
        settings: Vec<NameValue>,
    },
    /// Take settings back.
    Reset {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        /// Their names.
        #[arg(required_unless_present = "all", conflicts_with = "all", value_name = "NAME")]
        names: Vec<String>,
        /// All of them, and lines of the file that are no settings.
        #[arg(long)]
        all: bool,
    },
}

pub(crate) async fn run(command: SettingsCommand, client: &Client, json: bool) -> anyhow::Result<()> {
    let settings: Settings = match command {
        SettingsCommand::List { branch } => client.get(&format!("{}/settings", branch.api())).await?,
        SettingsCommand::Set { branch, settings } => {
            let set = settings.into_iter().map(|NameValue { name, value }| (name, value)).collect();
            change(client, &branch, &SettingsChange { set, ..SettingsChange::default() }).await?
        }
        SettingsCommand::Reset { branch, names, all } => {
            change(client, &branch, &SettingsChange { reset_all: all, reset: names, ..SettingsChange::default() }).await?
        }
    };
    output::print(json, &settings, || {
        let rows: Vec<Vec<String>> = settings.settings.iter().map(|(name, value)| vec![name.clone(), value.clone()]).collect();
        let others: String = settings.others.iter().map(|line| format!("\nno setting: {line}")).collect();
        output::table(&["SETTING", "VALUE"], &rows) + &others
    })
}

async fn change(client: &Client, branch: &BranchPath, change: &SettingsChange) -> anyhow::Result<Settings> {
    client.call(Method::PATCH, &format!("{}/settings", branch.api()), Some(change)).await
}
