//! The `relay` command: publishes the log to the queue, without playing.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use clap::builder::FalseyValueParser;
use tracing::info;

use super::{print, shutdown_signal};
use crate::command::config::Config;
use crate::engine::error::Error;
use crate::engine::play::check_queue;
use crate::engine::relay::{Relay, RelayOutcome, RelaySettings};
use crate::engine::stall_watch::StallWatch;
use crate::model::event::Position;
use crate::model::text::count;
use crate::model::wait_log::Reminder;
use crate::queue::Queue;
use crate::store::EventStore;

#[derive(Debug, Args)]
#[command(after_help = "\
A worker publishes the log itself, so a relay of its own is for an installation whose projectors \
run elsewhere, for example in functions.\n\n\
Examples:\n\
\x20 projectionist relay\n\
\x20 projectionist relay --once")]
pub(super) struct RelayCommand {
    /// Publish the unpublished events, and exit
    #[arg(long, env = "PROJECTIONIST_ONCE", value_parser = FalseyValueParser::new())]
    once: bool,

    #[command(flatten)]
    options: RelayOptions,
}

/// The options of every command that publishes the log.
#[derive(Debug, Args)]
pub(super) struct RelayOptions {
    /// The pause between two reads of a log without new events, in milliseconds; a twentieth of it
    /// while events arrive
    #[arg(long, value_name = "MS", env = "PROJECTIONIST_RELAY_INTERVAL", default_value_t = 50,
          value_parser = clap::value_parser!(u64).range(1..=60_000))]
    relay_interval: u64,

    /// The longest pause between two reads, in milliseconds. Without events, the pause grows to a
    /// fiftieth of the time since the last one, up to this
    #[arg(long, value_name = "MS", env = "PROJECTIONIST_RELAY_IDLE_INTERVAL",
          default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    relay_idle_interval: u64,

    /// The most events in one message; the queue's maximum message size is another limit
    #[arg(long, value_name = "EVENTS", env = "PROJECTIONIST_MESSAGE_EVENTS", default_value_t = 1000,
          value_parser = clap::value_parser!(u64).range(1..=10_000))]
    message_events: u64,
}

impl RelayOptions {
    pub(super) fn settings(&self) -> RelaySettings {
        RelaySettings {
            interval: Duration::from_millis(self.relay_interval),
            idle_interval: Duration::from_millis(self.relay_idle_interval),
            max_events: self.message_events as usize,
        }
    }
}

impl RelayCommand {
    pub(super) async fn run(self, config: &Config) -> Result<(), Error> {
        let mut shutdown = pin!(shutdown_signal()?);
        let reporter = config.reporter();
        let connect = async { Ok::<_, Error>((config.database().await?, config.queue().await?)) };
        let (database, queue) = tokio::select! {
            connected = connect => connected?,
            () = &mut shutdown => return Ok(()),
        };
        let store = EventStore::new(&database);
        if let Some(identity) = queue.identity() {
            tokio::select! {
                checked = check_queue(&store, &identity) => checked?,
                () = &mut shutdown => return Ok(()),
            }
        }
        let mut relay = Relay::new(
            store.clone(),
            Arc::new(queue),
            self.options.settings(),
            StallWatch::default(),
        );
        if !self.once {
            // If the tables are missing, this fails at once. The relay's loop would retry without
            // end.
            let marks = tokio::select! {
                marks = store.marks() => marks?,
                () = &mut shutdown => return Ok(()),
            };
            info!(
                published = marks.published.get(),
                high_water = marks.high_water.get(),
                "publishing"
            );
            let relaying = async {
                tokio::select! {
                    () = relay.run() => {}
                    () = &mut shutdown => relay.release_lease().await,
                }
            };
            reporter.flush_while(relaying).await;
            return Ok(());
        }
        let relaying = async {
            let mut published = 0;
            let began = Instant::now();
            let mut reminder = Reminder::after_a_second(began);
            loop {
                let outcome = tokio::select! {
                    outcome = relay.publish_new() => outcome?,
                    () = &mut shutdown => return Ok((published, store.marks().await?.published)),
                };
                match outcome {
                    RelayOutcome::Published { events: 0, through } => {
                        return Ok((published, through));
                    }
                    RelayOutcome::Published { events, .. } => published += events,
                    // The other relay publishes the events, or its lease expires.
                    RelayOutcome::LeasedElsewhere => {
                        let (through, end) = progress(&store).await?;
                        if through >= end {
                            return Ok((published, through));
                        }
                        if reminder.is_due(Instant::now()) {
                            info!(
                                published = through.get(),
                                seconds = began.elapsed().as_secs(),
                                "waiting for another relay, which holds the lease, to publish up \
                                 to {end}"
                            );
                        }
                        tokio::select! {
                            () = tokio::time::sleep(Duration::from_millis(200)) => {}
                            () = &mut shutdown => return Ok((published, through)),
                        }
                    }
                }
            }
        };
        let relayed: Result<_, Error> = relaying.await;
        reporter.flush();
        let (published, through) = relayed?;
        relay.release_lease().await;
        print(format!("published {}, up to position {through}", count(published, "event")))
    }
}

/// The published position, and the position through which a relay can publish now: the last visible
/// one, or the mark while something blocks it.
async fn progress(store: &EventStore) -> Result<(Position, Position), sqlx::Error> {
    let marks = store.marks().await?;
    let end = if marks.blocked.is_some() { marks.high_water } else { store.last_visible().await? };
    Ok((marks.published, end))
}
