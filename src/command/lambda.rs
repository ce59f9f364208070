//! `lambda`: the worker as a function of AWS Lambda.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};

use super::play::CatchUpOptions;
use super::relay::RelayOptions;
use super::shutdown_signal;
use crate::command::config::Config;
use crate::database::Database;
use crate::engine::play::{Deadline, Worker};
use crate::engine::relay::Relay;
use crate::lambda::{RuntimeApi, Trigger, parse, relay_and_reconcile};
use crate::model::error::Error;
use crate::model::registry::Registry;
use crate::queue::Queue;
use crate::telemetry::{LagSource, Reporter};

/// Of a function's initialization; Lambda breaks it off after 10 s, and then nobody is told why.
const INIT_TIMEOUT: Duration = Duration::from_secs(8);

/// Connections that are open at once, unless it is said otherwise: there may be many functions.
const DEFAULT_CONNECTIONS: u32 = 4;

#[derive(Debug, Args)]
#[command(after_help = "\
AWS Lambda starts this: also without the word `lambda`, where AWS_LAMBDA_RUNTIME_API is set and there are no arguments. It is \
invoked with batches of messages by an SQS event source mapping with ReportBatchItemFailures, and by a schedule. docs/lambda.md has \
the settings.")]
pub(super) struct LambdaCommand {
    /// How long before the function's time-out an invocation stops, rolls back what is not
    /// committed, and answers, in milliseconds
    #[arg(long, value_name = "MS", env = "PROJECTIONIST_DEADLINE_MARGIN", default_value_t = 2_000,
          value_parser = clap::value_parser!(u64).range(200..=60_000))]
    deadline_margin: u64,

    /// For how long a scheduled invocation publishes what comes, in seconds; 0: until what was
    /// there is published
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_RELAY_SECONDS", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(0..=900))]
    relay_seconds: u64,

    /// For how long connections are kept that no invocation uses, in seconds. Whoever is frozen for
    /// longer finds them dead, and may not be told so
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_IDLE_TIMEOUT", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(0..=50))]
    idle_timeout: u64,

    #[command(flatten)]
    catch_up: CatchUpOptions,

    #[command(flatten)]
    relay: RelayOptions,
}

/// What is made once, and used by every invocation.
struct Function<'a> {
    options: LambdaCommand,
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

impl LambdaCommand {
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
        let init = timeout(INIT_TIMEOUT, Function::init(self, config, registry));
        let init = tokio::select! {
            biased;
            stop = shutdown.wait_for(|stop| *stop) => return shutdown_result(stop.is_ok()),
            init = init => init,
        };
        let late = || {
            let seconds = INIT_TIMEOUT.as_secs();
            Error::Unreachable(format!(
                "the database did not answer within {seconds} s; check that the function may reach it"
            ))
        };
        let mut function = match init.unwrap_or_else(|_| Err(late())) {
            Ok(function) => function,
            Err(error) => {
                api.report_init_error(&error).await;
                return Err(error);
            }
        };
        info!("ready");
        loop {
            let invocation = tokio::select! {
                biased;
                stop = shutdown.wait_for(|stop| *stop) => return shutdown_result(stop.is_ok()),
                next = api.next() => next?,
            };
            let response =
                function.invoke(&invocation.event, invocation.remaining(), &shutdown).await;
            api.respond(invocation, response).await;
        }
    }
}

/// The end of the function: by a signal, or because the task that waits for signals has ended
/// without one.
fn shutdown_result(is_by_signal: bool) -> Result<(), Error> {
    match is_by_signal {
        true => Ok(()),
        false => {
            Err(Error::Unreachable("the task that waits for signals has ended without one".into()))
        }
    }
}

impl<'a> Function<'a> {
    async fn init(
        options: LambdaCommand,
        config: &'a Config,
        registry: Registry,
    ) -> Result<Self, Error> {
        let registry = config.nonempty_registry(registry)?;
        let reporter = config.reporter();
        let database = config.database_with(DEFAULT_CONNECTIONS).await?;
        let (background_limits, reconcile_after) =
            (options.catch_up.background_limits(), options.catch_up.reconcile_after());
        let worker = Worker::new(
            &database,
            &registry,
            config.play_limits(),
            background_limits,
            reconcile_after,
        )
        .await?;
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
        self.prepare(&deadline);
        let response = match parse(event)? {
            Trigger::Messages(batch) => {
                self.check_queue(&batch.queue_arn, &deadline).await;
                let processed =
                    self.worker.fan_out_until(&batch.ids, &batch.bodies, &deadline).await;
                self.reporter.flush();
                Ok(batch.response(&processed))
            }
            Trigger::Schedule => {
                let response = self.run_schedule(&deadline).await;
                let lag_source = LagSource::new(&self.database, &self.registry);
                let report = self.reporter.report(&lag_source, response.is_ok());
                if timeout(deadline.query_timeout(), report).await.is_err() {
                    self.reporter.flush();
                }
                response
            }
        };
        self.last_used = SystemTime::now();
        response
    }

    /// Looks once whether the log was last published to another queue. That only tells of
    /// something: where it cannot be told now, the next invocation will.
    async fn check_queue(&mut self, queue: &str, deadline: &Deadline) {
        if !self.has_checked_queue {
            let check =
                timeout(deadline.query_timeout(), self.worker.check_queue(Some(queue.to_owned())));
            self.has_checked_queue = check.await.is_ok_and(|checked| checked.is_ok());
        }
    }

    /// Lets go of what may not have outlived the time since the last invocation; by the host's
    /// clock, for the process's own may have stood still.
    fn prepare(&mut self, deadline: &Deadline) {
        let idle_timeout = Duration::from_secs(self.options.idle_timeout);
        if !self.last_used.elapsed().is_ok_and(|unused| unused < idle_timeout) {
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

    async fn run_schedule(&mut self, deadline: &Deadline) -> Result<Value, Error> {
        let queue = match &self.queue {
            Some(queue) => Arc::clone(queue),
            None => {
                let connected = tokio::select! {
                    connected = self.config.queue() => connected?,
                    () = deadline.reached() => return Err(Error::Unreachable("the queue did not answer in time".into())),
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
