//! The command line. Each command has a file of its own. A binary with projectors in Rust passes
//! its registry to [`run`], and has every command.

mod append;
mod audit;
mod boot;
mod config;
mod conformance;
mod doctor;
mod exit_code;
mod fill;
mod health;
mod lambda;
mod output;
mod play;
mod relay;
mod retire;
mod rotate;
mod selection;
mod status;

use std::ffi::OsString;
use std::future::Future;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use crate::command::config::Config;
use crate::command::output::{print, print_json};
use crate::engine::error::Error;
use crate::lambda::RUNTIME_API;
use crate::model::registry::Registry;
use crate::model::text;
use crate::telemetry;

/// Boots, plays and retires projectors: replays a MySQL event store, then hands over to one live
/// SQS queue.
///
/// Exit codes: 0 success; 1 a projector, an audit or a health check failed; 2 wrong usage,
/// configuration or input; 3 the database or the queue cannot be reached; 143 interrupted. Results
/// go to standard output, logs to standard error.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 80,
    after_help = "\
Examples:
  export DATABASE_URL=mysql://user:password@host/database PROJECTORS=projectors
  projectionist migrate                  once, and with each new version
  projectionist boot                     in the deploy, before the release goes live
  projectionist play --queue-url URL     in the worker
  projectionist status                   at any time"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    config: Config,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Creates or upgrades the tables; safe to repeat
    #[command(after_help = "Examples:\n  projectionist migrate")]
    Migrate,
    /// Appends events from a file or standard input, one JSON object per line
    Append(append::AppendCommand),
    /// Boots every new, booting, stalled or broken projector, hands it over to the queue, and
    /// exits: the deploy gate
    Boot(boot::BootCommand),
    /// Plays every live projector: the worker
    Play(play::PlayCommand),
    /// Plays as an AWS Lambda function, invoked with messages and by a schedule
    Lambda(lambda::LambdaCommand),
    /// Publishes the log to the queue, without playing
    Relay(relay::RelayCommand),
    /// Shows every projector, the high-water mark and the published position
    Status(status::StatusCommand),
    /// Retires a projector: runs its teardown, and deletes its ledger row unless it has side
    /// effects
    Retire(retire::RetireCommand),
    /// Checks, while everything runs, that the log up to the high-water mark is unchanged
    Audit(audit::AuditCommand),
    /// Fills a gap in the log that is too wide to be filled automatically
    Fill(fill::FillCommand),
    /// Gives the log a new id and a new signing key: after a restore or a clone, or if the key may
    /// have leaked
    Rotate(rotate::RotateCommand),
    /// Checks the set-up of database, queue, grants, permissions and projectors, and changes
    /// nothing
    Doctor(doctor::DoctorCommand),
    /// Checks a handler in another language against the protocol, on a scratch database
    Conformance(conformance::ConformanceCommand),
    /// Checks that a worker's loop still runs: the health check of its container
    Health(health::HealthCommand),
}

/// Runs the command line with the projectors of `registry` and those of the files in
/// `--projectors`.
///
/// Starts a Tokio runtime and logging. Returns the exit code for `main`.
pub fn run(registry: Registry) -> ExitCode {
    let cli = Cli::parse_from(arguments());
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the async runtime: {error}");
            return ExitCode::from(exit_code::USAGE);
        }
    };
    if cli.config.redact_errors {
        text::redact_errors();
    }
    let telemetry = telemetry::start(
        cli.config.log_format,
        &cli.config.log,
        cli.config.alert_url.as_deref(),
        &cli.config.service,
    );
    let ended = telemetry
        .and_then(|_telemetry| runtime.block_on(execute(cli.command, &cli.config, registry)));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            telemetry::log_error(&error, cli.config.log_format);
            exit_code::exit_code(&error)
        }
    }
}

/// Returns the arguments of the process. AWS Lambda starts it without arguments: the command is
/// then `lambda`.
fn arguments() -> Vec<OsString> {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.len() == 1 && std::env::var_os(RUNTIME_API).is_some() {
        arguments.push("lambda".into());
    }
    arguments
}

async fn execute(command: Command, config: &Config, registry: Registry) -> Result<(), Error> {
    match command {
        Command::Migrate => {
            config.database().await?.migrate().await?;
            print("the tables are up to date")
        }
        Command::Append(append) => append.run(config).await,
        Command::Boot(boot) => boot.run(config, registry).await,
        Command::Play(play) => play.run(config, registry).await,
        Command::Lambda(lambda) => lambda.run(config, registry).await,
        Command::Relay(relay) => relay.run(config).await,
        Command::Status(status) => status.run(config, registry).await,
        Command::Retire(retire) => retire.run(config, registry).await,
        Command::Audit(audit) => audit.run(config).await,
        Command::Fill(fill) => fill.run(config).await,
        Command::Rotate(rotate) => rotate.run(config).await,
        Command::Doctor(doctor) => doctor.run(config, registry).await,
        Command::Conformance(conformance) => conformance.run(config).await,
        Command::Health(health) => health.run(),
    }
}

/// Asks the user to confirm a step that cannot be undone, unless `yes` is set. `what` describes it.
///
/// # Errors
/// [`Error::Input`] if the answer is not yes, or if there is no terminal to ask on.
fn confirm(what: &str, yes: bool) -> Result<(), Error> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(Error::Input(format!(
            "{what}: there is no terminal to ask on; add --yes to confirm"
        )));
    }
    eprint!("{what}. Continue? [y/N] ");
    let mut answer = String::new();
    let read = std::io::stdin().read_line(&mut answer);
    if read.is_ok() && matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        Ok(())
    } else {
        Err(Error::Input("not confirmed; nothing was done".into()))
    }
}

/// Returns a future that resolves at SIGTERM or SIGINT. See [`next_signal`].
fn shutdown_signal() -> Result<impl Future<Output = ()>, Error> {
    let signal = next_signal()?;
    Ok(async {
        signal.await;
    })
}

/// Returns a future that resolves at SIGTERM or SIGINT, with the signal. It listens from this call
/// on, and not from the first poll, so that a signal during start-up does not kill the process.
fn next_signal() -> Result<impl Future<Output = SignalKind>, Error> {
    let listen = |kind| {
        signal(kind).map_err(|error| Error::Input(format!("cannot listen for signals: {error}")))
    };
    let (mut terminate, mut interrupt) =
        (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => SignalKind::terminate(),
            _ = interrupt.recv() => SignalKind::interrupt(),
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// The long help of the program and of each command.
    fn helps() -> Vec<(String, String)> {
        let mut program = Cli::command();
        program.build();
        let mut helps = vec![("projectionist".to_owned(), program.render_long_help().to_string())];
        for command in program.get_subcommands_mut().filter(|command| command.get_name() != "help")
        {
            helps.push((command.get_name().to_owned(), command.render_long_help().to_string()));
        }
        helps
    }

    #[test]
    fn every_help_has_examples_that_parse() {
        for (name, help) in helps() {
            let (_, examples) = help.split_once("Examples:\n").unwrap_or_else(|| panic!("{name}"));
            let commands = examples.lines().filter_map(|line| line.strip_prefix("  projectionist"));
            let mut parsed = 0;
            for command in commands {
                // In the shell, `<` names the input. Three blanks separate an explanation.
                let command = command.split(" < ").next().unwrap_or_default();
                let command = command.split("   ").next().unwrap_or_default();
                let mut quoted = command.split('\'');
                let mut arguments = vec!["projectionist"];
                arguments.extend(quoted.next().unwrap_or_default().split_whitespace());
                arguments.extend(quoted.next());
                let result = Cli::try_parse_from(&arguments);
                assert!(result.is_ok(), "{name}: {arguments:?}: {result:?}");
                parsed += 1;
            }
            assert!(parsed > 0, "{name} has no example: {help}");
        }
    }

    #[test]
    fn no_line_of_a_help_is_longer_than_80_columns() {
        for (name, help) in helps() {
            let long: Vec<&str> = help.lines().filter(|line| line.chars().count() > 80).collect();
            assert_eq!(long, [""; 0], "{name}");
        }
    }
}
