//! `varve tenant`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use reqwest::Method;
use varve_api::admin::{NewTenant, Tenant, TenantPassword};
use varve_api::history::{History, TenantChange};
use varve_api::verification::RestoreVerification;

use super::verify_restore::{how_far, in_words as verified_in_words};
use crate::client::{Client, ListArgs, segment};
use crate::output;
use crate::output::confirm;
use crate::progress::spinner;

#[derive(Debug, Subcommand)]
pub(crate) enum TenantCommand {
    /// Create a tenant with a branch `main`.
    Create {
        /// Unique name.
        name: String,
        /// Postgres major; by default the newest that the server has.
        #[arg(long)]
        pg_version: Option<u32>,
    },
    /// List the tenants.
    List(ListArgs),
    /// Show a tenant.
    Show {
        /// Its name.
        name: String,
    },
    /// Change how far back a tenant's branches can go, and how often it is verified that restores of it work.
    Set {
        /// Its name.
        name: String,
        /// How long history is kept: 7d, 12h, 30min, or forever.
        #[arg(long, value_parser = window)]
        history: Option<Window>,
        /// How many bytes of WAL of each branch are kept at most: 50GB, 512MB, or unlimited.
        #[arg(long, value_parser = wal_bytes)]
        history_bytes: Option<Window>,
        /// How often it is verified that a restore works: 7d, 12h, off, or default for what the server says.
        #[arg(long, value_parser = every)]
        verify_restore: Option<Window>,
    },
    /// Verify that a restore works: a branch at a moment by chance is started, all that is in it is checked, and it is
    /// deleted. The exit status is 3 when something is damaged, 1 when it could not be found out.
    VerifyRestore(super::verify_restore::VerifyRestoreArgs),
    /// Collect at once what a tenant need not keep any more; it happens by itself, too.
    Collect {
        /// Its name.
        name: String,
    },
    /// Take a tenant over from the server that has it: that one acknowledges and serves nothing more of it.
    Take {
        /// Its name.
        name: String,
    },
    /// Show the password of a tenant's superuser, as Varve gave it last.
    Password {
        /// Its name.
        name: String,
        /// Give another one: to running computes at once, to everything else at its next start.
        #[arg(long)]
        rotate: bool,
    },
    /// Delete a tenant: its computes stop, its history goes for good.
    Delete {
        /// Its name.
        name: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

/// The end of a window; none: it has none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window(Option<u64>);

fn window(text: &str) -> Result<Window, String> {
    if text.eq_ignore_ascii_case("forever") {
        return Ok(Window(None));
    }
    let time = humantime::parse_duration(text).map_err(|error| format!("{error}: write 7d, 12h, 30min, or forever"))?;
    Ok(Window(Some(time.as_secs())))
}

fn wal_bytes(text: &str) -> Result<Window, String> {
    if text.eq_ignore_ascii_case("unlimited") {
        return Ok(Window(None));
    }
    let bytes = super::size::bytes_of(text).ok_or_else(|| format!("'{text}' cannot be read: write 50GB, 512MB, or unlimited"))?;
    Ok(Window(Some(bytes)))
}

fn every(text: &str) -> Result<Window, String> {
    match text {
        "off" => Ok(Window(Some(0))),
        "default" => Ok(Window(None)),
        text => match humantime::parse_duration(text) {
            Ok(time) if time.as_secs() > 0 => Ok(Window(Some(time.as_secs()))),
            Ok(_) => Err("a second is the least: write 7d, 12h, off, or default".to_owned()),
            Err(error) => Err(format!("{error}: write 7d, 12h, off, or default")),
        },
    }
}

/// How often restores are verified.
fn how_often(every_seconds: Option<u64>) -> String {
    match every_seconds {
        None => "as the server says".to_owned(),
        Some(0) => "off".to_owned(),
        Some(seconds) => format!("every {}", humantime::format_duration(Duration::from_secs(seconds))),
    }
}

/// What is known of restores of a tenant.
fn restores(known: &RestoreVerification) -> String {
    let last = match (&known.running, &known.last) {
        (Some(running), _) => format!("is being verified; {}", how_far(running)),
        (None, Some(last)) => format!("{} ago {}", output::age(&last.ended_at), verified_in_words(last)),
        (None, None) => "never verified".to_owned(),
    };
    format!("{last}\nverification       {}", how_often(known.every_seconds))
}

/// How far back a tenant can go.
fn in_words(history: History) -> String {
    let time = history
        .seconds
        .map_or_else(|| "to its beginning".to_owned(), |seconds| humantime::format_duration(Duration::from_secs(seconds)).to_string());
    match history.wal_bytes {
        None => time,
        Some(bytes) => format!("{time}, and at most {} of WAL", output::bytes(bytes)),
    }
}

/// Does what is asked for; the exit status says what was found, where something was looked at.
pub(crate) async fn run(command: TenantCommand, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let done = match command {
        TenantCommand::Create { name, pg_version } => {
            let body = NewTenant { name, pg_version };
            let work = client.post::<Tenant>("tenants", &body);
            let tenant = spinner("creating the tenant (the first of a Postgres version makes a template)", work).await?;
            output::print(json, &tenant, || {
                format!("tenant {} (PostgreSQL {}) with branch {}/main", tenant.name, tenant.pg_version, tenant.name)
            })
        }
        TenantCommand::VerifyRestore(args) => return super::verify_restore::run(args, client, json).await,
        TenantCommand::Set { name, history, history_bytes, verify_restore } => {
            let value = |window: Option<Window>| window.map(|Window(value)| value);
            let change = TenantChange {
                history_seconds: value(history),
                history_wal_bytes: value(history_bytes),
                verify_restore_seconds: value(verify_restore),
            };
            let path = format!("tenants/{}", segment(&name));
            let tenant: Tenant = client.call(Method::PATCH, &path, Some(&change)).await?;
            output::print(json, &tenant, || {
                let often = how_often(tenant.restore_verification.every_seconds);
                format!("tenant {} can go back {}; verification of restores: {often}", tenant.name, in_words(tenant.history))
            })
        }
        TenantCommand::Collect { name } => {
            let path = format!("tenants/{}/collect", segment(&name));
            let tenant: Tenant = spinner("collecting", client.post(&path, &serde_json::json!({}))).await?;
            output::print(json, &tenant, || {
                format!("tenant {} keeps what it must: it can go back {}", tenant.name, in_words(tenant.history))
            })
        }
        TenantCommand::Take { name } => {
            let path = format!("tenants/{}/take", segment(&name));
            let tenant: Tenant = client.post(&path, &serde_json::json!({})).await?;
            output::print(json, &tenant, || format!("tenant {} is this server's", tenant.name))
        }
        TenantCommand::Password { name, rotate } => {
            let path = format!("tenants/{}/password", segment(&name));
            let password: TenantPassword =
                if rotate { client.post(&path, &serde_json::json!({})).await? } else { client.get(&path).await? };
            output::print(json, &password, || password.password.clone())
        }
        TenantCommand::List(list) => {
            let tenants: Vec<Tenant> = client.list("tenants", &list).await?;
            output::print(json, &tenants, || {
                let rows: Vec<Vec<String>> = tenants
                    .iter()
                    .map(|t| match &t.problem {
                        None => vec![t.name.clone(), t.pg_version.to_string(), t.branches.to_string(), output::age(&t.created_at)],
                        Some(problem) => vec![t.name.clone(), String::new(), String::new(), String::new(), problem.clone()],
                    })
                    .collect();
                let problems = tenants.iter().any(|t| t.problem.is_some());
                let header = ["TENANT", "POSTGRES", "BRANCHES", "AGE", "PROBLEM"];
                output::table(if problems { &header } else { &header[..4] }, &rows)
            })
        }
        TenantCommand::Show { name } => {
            let t: Tenant = client.get(&format!("tenants/{}", segment(&name))).await?;
            output::print(json, &t, || {
                let owner = t.owner.as_ref().map_or_else(
                    || "not known".to_owned(),
                    |owner| format!("{} at {}{}", owner.server, owner.url, if owner.here { " (this server)" } else { "" }),
                );
                format!(
                    "tenant             {}\nid                 {}\nPostgreSQL         {}\nsystem identifier  {}\nbranches           {}\n\
                     history            {}\nrestore            {}\ncreated            {}\nowner              {owner}",
                    t.name,
                    t.id,
                    t.pg_version,
                    t.system_identifier,
                    t.branches,
                    in_words(t.history),
                    restores(&t.restore_verification),
                    t.created_at
                )
            })
        }
        TenantCommand::Delete { name, yes } => {
            let path = format!("tenants/{}", segment(&name));
            if !yes {
                let tenant: Tenant = client.get(&path).await?;
                confirm(&format!("Delete tenant {} with its {} branches and all their history?", tenant.name, tenant.branches))?;
            }
            let work = client.call::<serde_json::Value>(Method::DELETE, &path, None::<&()>);
            let answer = spinner("deleting the tenant", work).await?;
            output::print(json, &answer, || format!("tenant {name} is deleted"))
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}
