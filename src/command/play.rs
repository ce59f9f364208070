//! The `play` command: the worker.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use clap::builder::FalseyValueParser;

use super::health::Heartbeat;
use super::relay::RelayOptions;
use super::{print, shutdown_signal};
use crate::command::config::Config;
use crate::engine::error::Error;
use crate::engine::play::{BackgroundLimits, PlaySettings, play};
use crate::model::registry::Registry;
use crate::model::text::count;
use crate::telemetry::LagSource;

#[derive(Debug, Args)]
#[command(after_help = "\
Plays only projectors that boot has made live. At SIGTERM or SIGINT the current batch is finished \
or rolled back, and the exit code is 0. A projector that was booted with another definition than \
this worker has is not played. With --until-idle, exit code 1 means that a projector broke, that \
a projector was not played because of its definition, or that the queue has messages that are not \
of this log. All other projectors are at the high-water mark then, too.\n\n\
Examples:\n\
\x20 projectionist play\n\
\x20 projectionist play --until-idle\n\
\x20 projectionist play --no-relay --heartbeat /run/projectionist/alive")]
pub(super) struct PlayCommand {
    /// Do not publish the log, because a relay runs elsewhere
    #[arg(long, env = "PROJECTIONIST_NO_RELAY", value_parser = FalseyValueParser::new())]
    no_relay: bool,

    /// Exit once queue and log have no new events and every live projector is at the high-water
    /// mark
    #[arg(long, env = "PROJECTIONIST_UNTIL_IDLE", value_parser = FalseyValueParser::new())]
    until_idle: bool,

    /// How long one receive waits for a message, in seconds; 1 with --until-idle
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_RECEIVE_WAIT", default_value_t = 5,
          value_parser = clap::value_parser!(u64).range(0..=20))]
    receive_wait: u64,

    /// How long the current batch may take after SIGTERM before it is rolled back, in seconds
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_GRACE_PERIOD", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(..=3600))]
    grace_period: u64,

    /// A file to touch every second while the loop runs or waits for messages or the database;
    /// `health` checks it
    #[arg(long, value_name = "FILE", env = "PROJECTIONIST_HEARTBEAT")]
    heartbeat: Option<PathBuf>,

    #[command(flatten)]
    catch_up: CatchUpOptions,

    #[command(flatten)]
    relay: RelayOptions,
}

/// The options of every command that plays.
#[derive(Debug, Args)]
pub(super) struct CatchUpOptions {
    /// How long a projector may stay below the high-water mark while no message arrives, before it
    /// reads the missing events from the store, in seconds
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_RECONCILE_AFTER", default_value_t = 2,
          value_parser = clap::value_parser!(u64).range(..=3600))]
    reconcile_after: u64,

    /// The most events that one projector catches up on while the others wait. With more, it
    /// catches up in the background
    #[arg(
        long,
        value_name = "EVENTS",
        env = "PROJECTIONIST_BACKGROUND_AFTER_EVENTS",
        default_value_t = 10_000
    )]
    background_after_events: u64,

    /// The longest time that one projector may take for the messages of one receive while the
    /// others wait, in seconds. After it, the projector continues in the background
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_BACKGROUND_AFTER_SECONDS",
          default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    background_after_seconds: u64,
}

impl CatchUpOptions {
    pub(super) fn background_limits(&self) -> BackgroundLimits {
        BackgroundLimits {
            events: self.background_after_events,
            time: Duration::from_secs(self.background_after_seconds),
        }
    }

    pub(super) fn reconcile_after(&self) -> Duration {
        Duration::from_secs(self.reconcile_after)
    }
}

impl PlayCommand {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let mut shutdown = pin!(shutdown_signal()?);
        let registry = config.nonempty_registry(registry)?;
        let reporter = config.reporter();
        let heartbeat = Heartbeat::new(self.heartbeat.as_deref())?;
        let connect = async {
            Ok::<_, Error>((config.database_for(&registry).await?, config.queue().await?))
        };
        let (database, queue) = tokio::select! {
            connected = connect => connected?,
            () = &mut shutdown => return Ok(()),
        };
        let receive_wait =
            if self.until_idle { self.receive_wait.min(1) } else { self.receive_wait };
        let settings = PlaySettings {
            limits: config.play_limits(),
            relay: (!self.no_relay).then(|| self.relay.settings()),
            receive_wait: Duration::from_secs(receive_wait),
            reconcile_after: self.catch_up.reconcile_after(),
            background_after: self.catch_up.background_limits(),
            until_idle: self.until_idle,
            grace_period: Duration::from_secs(self.grace_period),
        };
        let playing = play(&database, Arc::new(queue), &registry, settings, shutdown);
        let lag_source = LagSource::new(&database, &registry);
        let played = tokio::select! {
            biased;
            played = reporter.report_while(&lag_source, playing) => played?,
            never = heartbeat.run() => match never {},
        };
        if !self.until_idle {
            return Ok(());
        }
        print(format!("idle: played {}", count(played.messages, "message")))?;
        match (played.broken, played.outdated, played.foreign) {
            (0, 0, 0) => Ok(()),
            (0, 0, foreign) => Err(Error::ForeignMessages(format!(
                "the queue has {} not of this log, not applied and not deleted. All projectors are \
                at the high-water mark. Find the sender, and check that this is the right queue",
                count(foreign, "message")
            ))),
            (0, outdated, _) => Err(Error::Projector(format!(
                "{} not played, because booted with another definition than this worker has; the \
                log lines before this give the names. Run boot with this set, or play with the set \
                that was booted",
                count(outdated, "projector")
            ))),
            (broken, ..) => Err(Error::Projector(format!(
                "{} broke and the others are at the high-water mark; see status, fix what broke, \
                and run boot",
                count(broken, "projector")
            ))),
        }
    }
}
