//! `varve tenant verify-restore`: proof that a restore works, now.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use varve_api::verification::{
    NewVerification, RestoreVerification, RunningVerification, Verification, VerificationOutcome, VerifiedMoment,
};

use super::branch::MomentArgs;
use crate::client::{Client, segment};
use crate::output;
use crate::progress::spinner_that_tells;

/// How often it is looked how far it is.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Exit status of damage; that something could not be found out is an error as any other.
const DAMAGED: u8 = 3;

#[derive(Debug, Args)]
pub(crate) struct VerifyRestoreArgs {
    /// The tenant.
    tenant: String,
    /// The branch whose history is restored.
    #[arg(long, default_value = "main")]
    branch: String,
    #[command(flatten)]
    moment: MomentArgs,
    /// Draw the moment from this number: the same number gives the same moment of the same window.
    #[arg(long, conflicts_with_all = ["lsn", "at"])]
    seed: Option<u64>,
    /// Only begin, and do not wait for what comes of it: 'varve tenant show' tells.
    #[arg(long)]
    no_wait: bool,
}

fn moment(of: &VerifiedMoment) -> String {
    let time = of.time.as_deref().map_or_else(String::new, |time| format!(" ({time})"));
    let seed = of.seed.map_or_else(String::new, |seed| format!(", drawn from {seed}"));
    format!("{} at {}{time}{seed}", of.branch, of.lsn)
}

/// What a verification came to, in one line and the lines of what was found.
pub(crate) fn in_words(found: &Verification) -> String {
    let outcome = match found.outcome {
        VerificationOutcome::Sound => "sound",
        VerificationOutcome::Damaged => "DAMAGED",
        VerificationOutcome::Failed => "not verified, the data is not in question",
    };
    let step = |ms: Option<u64>| ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms"));
    let mut text = format!(
        "{outcome}: {}; branch {} ms, start {}, check {} of {} relations with {} pages",
        moment(&found.of),
        found.branch_ms,
        step(found.start_ms),
        step(found.check_ms),
        found.relations,
        found.pages
    );
    for problem in &found.problems {
        text += &format!("\n  {problem}");
    }
    text
}

/// How far one is.
pub(crate) fn how_far(running: &RunningVerification) -> String {
    format!("{}: {}, {} relations with {} pages so far", moment(&running.of), running.step.words(), running.relations, running.pages)
}

pub(crate) async fn run(args: VerifyRestoreArgs, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let path = format!("tenants/{}/restore-verification", segment(&args.tenant));
    let new = NewVerification { branch: Some(args.branch), lsn: args.moment.lsn, at: args.moment.at, seed: args.seed };
    let begun: RestoreVerification = client.post(&path, &new).await?;
    let found = match begun.running {
        // Not even a branch could be made.
        None => begun.last,
        Some(running) if args.no_wait => {
            output::print(json, &running, || format!("begun: {}", how_far(&running)))?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(running) => Some(spinner_that_tells(|told| wait(client, &path, running, told)).await?),
    };
    let found = found.ok_or_else(|| anyhow::anyhow!("the server does not say what came of it: see 'varve tenant show {}'", args.tenant))?;
    output::print(json, &found, || in_words(&found))?;
    Ok(match found.outcome {
        VerificationOutcome::Sound => ExitCode::SUCCESS,
        VerificationOutcome::Damaged => ExitCode::from(DAMAGED),
        VerificationOutcome::Failed => ExitCode::FAILURE,
    })
}

/// Waits until this one is over.
async fn wait(client: &Client, path: &str, begun: RunningVerification, told: impl Fn(String)) -> anyhow::Result<Verification> {
    let is_it = |running: &RunningVerification| running.begun_at == begun.begun_at;
    told(how_far(&begun));
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let known: RestoreVerification = client.get(path).await?;
        if let Some(running) = known.running.as_ref().filter(|running| is_it(running)) {
            told(how_far(running));
            continue;
        }
        return known
            .last
            .filter(|last| last.begun_at == begun.begun_at)
            .ok_or_else(|| anyhow::anyhow!("another verification has begun since, and what came of this one is not known any more"));
    }
}
