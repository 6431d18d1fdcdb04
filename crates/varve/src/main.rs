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

fn main() -> ExitCode {
    let cli = commands::Cli::parse();
    if let Some(status) = commands::run_alone(&cli) {
        std::process::exit(status);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("varve: no threads can be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(commands::run(cli)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("varve: {error:#}");
            ExitCode::FAILURE
        }
    }
}
