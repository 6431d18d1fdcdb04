//! `varve`: one binary for the server, for computes and for the operator.

mod branch_wal;
mod client;
mod commands;
mod door;
mod host_token;
mod output;
mod progress;

use std::process::ExitCode;

use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = commands::Cli::parse();
    match commands::run(cli).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("varve: {error:#}");
            ExitCode::FAILURE
        }
    }
}
