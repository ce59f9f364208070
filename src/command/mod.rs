//! The command line: one command a file. A team's binary hands its registry to [`run`] and has them
//! all.

mod append;
mod audit;
mod boot;
mod config;
mod doctor;
mod exit_code;
mod fill;
mod health;
mod lambda;
mod play;
mod relay;
mod retire;
mod rotate;
mod status;

use std::ffi::OsString;
use std::future::Future;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::command::config::Config;
use crate::lambda::RUNTIME_API;
use crate::model::error::Error;
use crate::model::registry::Registry;
use crate::model::text;
use crate::telemetry;

/// Boots, plays and retires projectors: replays a MySQL event store, then hands over to one live
/// SQS queue.
///
/// Exit codes: 0 well, 1 a projector failed (or a worker is ill), 2 usage, configuration or input,
/// 3 database or queue out of reach. Results go to standard output, logs to standard error.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    config: Config,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Creates or upgrades the tables; harmless to repeat
    Migrate,
    /// Appends events from a file or standard input, one JSON object a line
    Append(append::AppendCommand),
    /// Boots every new, booting, stalled and broken projector, hands them over, and exits: the
    /// deploy gate
    Boot(boot::BootCommand),
    /// Plays every live projector: the worker
    Play(play::PlayCommand),
    /// Plays as a function of AWS Lambda, invoked with messages and by a schedule
    Lambda(lambda::LambdaCommand),
    /// Publishes the log to the queue, without playing
    Relay(relay::RelayCommand),
    /// Shows every projector, the high-water mark and the published position
    Status(status::StatusCommand),
    /// Retires a projector: tears down what it made, and forgets it unless it has side effects
    Retire(retire::RetireCommand),
    /// Proves or refutes, while everything runs, that the log is what the high-water mark passed
    /// over
    Audit(audit::AuditCommand),
    /// Fills a gap in the log that is too wide to be filled unasked
    Fill(fill::FillCommand),
    /// Gives the log a new id and a new signing key: after a restore or a clone, or when the key
    /// may have leaked
    Rotate(rotate::RotateCommand),
    /// Looks whether database, queue, grants, permissions and projectors are set up as they should
    /// be, and changes nothing
    Doctor(doctor::DoctorCommand),
    /// Looks whether a worker's loop still turns: the health check of its container
    Health(health::HealthCommand),
}

/// Runs the command line with these projectors, and those of the files that `--projectors` names.
///
/// Starts its own runtime and logs; returns what `main` should.
pub fn run(registry: Registry) -> ExitCode {
    let cli = Cli::parse_from(arguments());
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::from(exit_code::USAGE);
        }
    };
    if cli.config.redact_errors {
        text::redact_errors();
    }
    let telemetry =
        telemetry::start(cli.config.log_format, &cli.config.log, cli.config.alert_url.as_deref());
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

/// The command line. Lambda starts `bootstrap` without any.
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
        Command::Health(health) => health.run(),
    }
}

/// Prints a result. A reader that has gone away (`| head`) is no error.
fn print(text: impl std::fmt::Display) -> Result<(), Error> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::Input(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Reads NAME[@VERSION].
fn parse_projector(text: &str) -> Result<(&str, Option<u32>), Error> {
    match text.split_once('@') {
        None => Ok((text, None)),
        Some((name, version)) => match version.parse() {
            Ok(version) => Ok((name, Some(version))),
            Err(_) => Err(Error::Input(format!("{text:?}: the version after @ must be a number"))),
        },
    }
}

/// Asks before something that cannot be undone. Without a terminal there is nobody to ask.
fn confirm(what: &str, yes: bool) -> Result<(), Error> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(Error::Input(format!(
            "{what}: there is no terminal to ask on; add --yes if you mean it"
        )));
    }
    eprint!("{what}. Go on? [y/N] ");
    let mut answer = String::new();
    let read = std::io::stdin().read_line(&mut answer);
    match read.is_ok() && matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        true => Ok(()),
        false => Err(Error::Input("nothing was done".into())),
    }
}

/// Resolves at SIGTERM or SIGINT. Listens from the call on and not from the first poll, so that a
/// signal during start-up is not the death of the process.
fn shutdown_signal() -> Result<impl Future<Output = ()>, Error> {
    use tokio::signal::unix::{SignalKind, signal};
    let listen = |kind| {
        signal(kind).map_err(|error| Error::Input(format!("cannot listen for signals: {error}")))
    };
    let (mut terminate, mut interrupt) =
        (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
