//! `lambda`: the worker as a function of AWS Lambda.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};

use super::play::ConvoyOptions;
use super::relay::RelayOptions;
use super::shutdown_signal;
use crate::command::config::Config;
use crate::database::Database;
use crate::engine::play::{Deadline, Worker};
use crate::engine::relay::Relay;
use crate::lambda::{Invoked, RuntimeApi, parse, relay_and_reconcile};
use crate::model::error::Error;
use crate::model::registry::Registry;
use crate::queue::Queue;
use crate::telemetry::{Reporter, Watched};

/// Of a function's initialization; Lambda breaks it off after 10 s, and then nobody is told why.
const INIT_WITHIN: Duration = Duration::from_secs(8);

/// Connections that are open at once, unless it is said otherwise: there may be many functions.
const CONNECTIONS: u32 = 4;

#[derive(Debug, Args)]
#[command(after_help = "\
AWS Lambda starts this: also without the word `lambda`, where AWS_LAMBDA_RUNTIME_API is set and there are no arguments. It is \
invoked with batches of messages by an SQS event source mapping with ReportBatchItemFailures, and by a schedule. docs/lambda.md has \
the settings.")]
pub(super) struct Lambda {
    /// How long before the function's time-out an invocation stops, rolls back what is not committed, and answers, in milliseconds
    #[arg(long, value_name = "MS", env = "PROJECTIONIST_DEADLINE_MARGIN", default_value_t = 2_000,
          value_parser = clap::value_parser!(u64).range(200..=60_000))]
    deadline_margin: u64,

    /// For how long a scheduled invocation publishes what comes, in seconds; 0: until what was there is published
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_RELAY_SECONDS", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(0..=900))]
    relay_seconds: u64,

    /// For how long connections are kept that no invocation uses, in seconds. Whoever is frozen for longer finds them dead, and
    /// may not be told so
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_IDLE_TIMEOUT", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(0..=50))]
    idle_timeout: u64,

    #[command(flatten)]
    convoy: ConvoyOptions,

    #[command(flatten)]
    relay: RelayOptions,
}

/// What is made once, and used by every invocation.
struct Function<'a> {
    options: Lambda,
    config: &'a Config,
    database: Database,
    registry: Registry,
    reporter: Reporter,
    worker: Worker,
    queue: Option<Arc<dyn Queue>>,
    last_used: SystemTime,
    has_been_invoked: bool,
    /// Whether it was looked whether the log was last published to another queue.
    has_checked_queue: bool,
}

impl Lambda {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let signal = shutdown_signal()?;
        let (stop, mut shutdown) = watch::channel(false);
        tokio::spawn(async move {
            signal.await;
            stop.send_replace(true);
            // The others listen as long as this is there.
            stop.closed().await;
        });
        let api = RuntimeApi::from_environment()?;
        let init = timeout(INIT_WITHIN, Function::init(self, config, registry));
        let init = tokio::select! {
            biased;
            stop = shutdown.wait_for(|stop| *stop) => return told_to_stop(stop.is_ok()),
            init = init => init,
        };
        let late = || {
            let seconds = INIT_WITHIN.as_secs();
            Error::OutOfReach(format!(
                "the database did not answer within {seconds} s; check that the function may reach it"
            ))
        };
        let mut function = match init.unwrap_or_else(|_| Err(late())) {
            Ok(function) => function,
            Err(error) => {
                api.init_failed(&error).await;
                return Err(error);
            }
        };
        info!("ready");
        loop {
            let invocation = tokio::select! {
                biased;
                stop = shutdown.wait_for(|stop| *stop) => return told_to_stop(stop.is_ok()),
                next = api.next() => next?,
            };
            let answer = function.invoke(&invocation.event, invocation.remaining(), &shutdown).await;
            api.answer(invocation, answer).await;
        }
    }
}

/// The end of the function: by a signal, or because the task that waits for signals has ended without one.
fn told_to_stop(is_by_signal: bool) -> Result<(), Error> {
    match is_by_signal {
        true => Ok(()),
        false => Err(Error::OutOfReach("the task that waits for signals has ended without one".into())),
    }
}

impl<'a> Function<'a> {
    async fn init(options: Lambda, config: &'a Config, registry: Registry) -> Result<Self, Error> {
        let registry = config.some_registry(registry)?;
        let reporter = config.reporter();
        let database = config.database_of(CONNECTIONS).await?;
        let (budget, reconcile_after) = (options.convoy.budget(), options.convoy.reconcile_after());
        let worker = Worker::new(&database, &registry, config.play_limits(), budget, reconcile_after).await?;
        let (last_used, has_been_invoked) = (SystemTime::now(), false);
        Ok(Function {
            options,
            config,
            database,
            registry,
            reporter,
            worker,
            queue: None,
            last_used,
            has_been_invoked,
            has_checked_queue: false,
        })
    }

    async fn invoke(
        &mut self,
        event: &str,
        remaining: Duration,
        shutdown: &watch::Receiver<bool>,
    ) -> Result<Value, Error> {
        let margin = Duration::from_millis(self.options.deadline_margin);
        let deadline = Deadline::after(remaining, margin, shutdown.clone());
        self.wake(&deadline);
        let answer = match parse(event)? {
            Invoked::Messages(batch) => {
                self.check_queue(&batch.queue, &deadline).await;
                let passed = self.worker.pass_until(&batch.ids, &batch.bodies, &deadline).await;
                self.reporter.flush();
                Ok(batch.answer(&passed))
            }
            Invoked::Schedule => {
                let answer = self.on_schedule(&deadline).await;
                let watched = Watched::new(&self.database, &self.registry);
                let report = self.reporter.report(&watched, answer.is_ok());
                if timeout(deadline.look_within(), report).await.is_err() {
                    self.reporter.flush();
                }
                answer
            }
        };
        self.last_used = SystemTime::now();
        answer
    }

    /// Looks once whether the log was last published to another queue. That only tells of something: where it cannot be told
    /// now, the next invocation will.
    async fn check_queue(&mut self, queue: &str, deadline: &Deadline) {
        if !self.has_checked_queue {
            let check = timeout(deadline.look_within(), self.worker.check_queue(Some(queue.to_owned())));
            self.has_checked_queue = check.await.is_ok_and(|checked| checked.is_ok());
        }
    }

    /// Lets go of what may not have outlived the time since the last invocation; by the host's clock, for the process's own
    /// may have stood still.
    fn wake(&mut self, deadline: &Deadline) {
        let kept_for = Duration::from_secs(self.options.idle_timeout);
        if !self.last_used.elapsed().is_ok_and(|unused| unused < kept_for) {
            self.database.close_idle();
            self.queue = None;
        }
        let longest = self.config.play_limits().handler_timeout;
        if !std::mem::replace(&mut self.has_been_invoked, true) && deadline.remaining() < longest {
            let (longest, time) = (longest.as_secs(), deadline.remaining().as_secs());
            warn!(
                "a handler may take {longest} s, and the function leaves it {time} s: what it does is rolled back at the \
                 function's time-out, again and again; raise that, or lower --handler-timeout"
            );
        }
    }

    async fn on_schedule(&mut self, deadline: &Deadline) -> Result<Value, Error> {
        let queue = match &self.queue {
            Some(queue) => Arc::clone(queue),
            None => {
                let connected = tokio::select! {
                    connected = self.config.queue() => connected?,
                    () = deadline.reached() => return Err(Error::OutOfReach("the queue did not answer in time".into())),
                };
                Arc::clone(self.queue.insert(Arc::new(connected)))
            }
        };
        if let Some(queue) = queue.identity() {
            self.check_queue(&queue, deadline).await;
        }
        let (store, watch) = (self.worker.engine.store.clone(), self.worker.watch.clone());
        let relay = Relay::new(store, queue, self.options.relay.settings(), watch);
        let relay_for = Duration::from_secs(self.options.relay_seconds);
        let summary = relay_and_reconcile(&mut self.worker, relay, relay_for, deadline).await?;
        serde_json::to_value(summary).map_err(|error| Error::Input(error.to_string()))
    }
}
