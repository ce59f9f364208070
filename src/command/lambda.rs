//! The `lambda` command: the worker as an AWS Lambda function.

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
use crate::engine::error::Error;
use crate::engine::play::{Deadline, Worker};
use crate::engine::relay::Relay;
use crate::lambda::{RuntimeApi, Trigger, parse, relay_and_reconcile};
use crate::model::registry::Registry;
use crate::queue::Queue;
use crate::telemetry::{LagSource, Reporter};

/// The longest initialization of a function. Lambda ends it after 10 s, and then the reason is not
/// reported.
const INIT_TIMEOUT: Duration = Duration::from_secs(8);

/// The default of `--connections`. It is low, because many functions can run at once.
const DEFAULT_CONNECTIONS: u32 = 4;

#[derive(Debug, Args)]
#[command(after_help = "\
AWS Lambda starts this command. Without any arguments the binary runs it, too, if \
AWS_LAMBDA_RUNTIME_API is set. An SQS event source mapping with ReportBatchItemFailures invokes \
it with batches of messages, and a schedule invokes it without. docs/lambda.md has the \
settings.\n\n\
Examples:\n\
\x20 projectionist lambda")]
pub(super) struct LambdaCommand {
    /// How long before the function's timeout an invocation stops, rolls back uncommitted work and
    /// responds, in milliseconds
    #[arg(long, value_name = "MS", env = "PROJECTIONIST_DEADLINE_MARGIN", default_value_t = 2_000,
          value_parser = clap::value_parser!(u64).range(200..=60_000))]
    deadline_margin: u64,

    /// How long a scheduled invocation publishes new events, in seconds. With 0 it publishes only
    /// the events that were in the log when it began
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_RELAY_SECONDS", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(0..=900))]
    relay_seconds: u64,

    /// How long unused connections are kept between invocations, in seconds. Connections of a
    /// function that was frozen for longer may be dead without an error
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_IDLE_TIMEOUT", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(0..=50))]
    idle_timeout: u64,

    #[command(flatten)]
    catch_up: CatchUpOptions,

    #[command(flatten)]
    relay: RelayOptions,
}

impl LambdaCommand {
    pub(super) async fn run(self, config: &Config, registry: Registry) -> Result<(), Error> {
        let signal = shutdown_signal()?;
        let (stop, mut shutdown) = watch::channel(false);
        tokio::spawn(async move {
            signal.await;
            stop.send_replace(true);
            // The channel must stay open for as long as a receiver listens.
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
                "the database did not answer within {seconds} s; check that the function can reach \
                it"
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

/// Returns the result of a function that ends by a signal, or because the task that waits for
/// signals has ended without one.
fn shutdown_result(is_by_signal: bool) -> Result<(), Error> {
    if is_by_signal {
        Ok(())
    } else {
        Err(Error::Unreachable("the task that waits for signals has ended without one".into()))
    }
}

/// The state of a function, which is created once and used by every invocation.
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
    /// Whether [`Function::check_queue`] has succeeded.
    has_checked_queue: bool,
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

    /// Warns once if the log was last published to another queue. If this cannot be checked now,
    /// the next invocation checks it.
    async fn check_queue(&mut self, queue: &str, deadline: &Deadline) {
        if !self.has_checked_queue {
            let check =
                timeout(deadline.query_timeout(), self.worker.check_queue(Some(queue.to_owned())));
            self.has_checked_queue = check.await.is_ok_and(|checked| checked.is_ok());
        }
    }

    /// Closes connections that may have died since the last invocation. The time is measured with
    /// the wall clock, because a monotonic clock can stop while the function is frozen.
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
                "a handler may take {longest} s, but the function leaves it {time} s: a slow \
                handler is rolled back at every timeout of the function; raise the function's \
                timeout, or lower --handler-timeout"
            );
        }
    }

    async fn run_schedule(&mut self, deadline: &Deadline) -> Result<Value, Error> {
        let queue = match &self.queue {
            Some(queue) => Arc::clone(queue),
            None => {
                let connected = tokio::select! {
                    connected = self.config.queue() => connected?,
                    () = deadline.reached() => {
                        let reason = "the queue did not answer in time";
                        return Err(Error::Unreachable(reason.into()));
                    }
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
