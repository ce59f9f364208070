//! Keeps a handler's process alive: starts it at the first message, greets it for each projector,
//! and starts it again after it has ended.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tracing::warn;

use super::process::{CommandSpec, Process};
use super::protocol::{PROTOCOL, Request, Response};
use super::stderr::CurrentProjector;
use crate::database::error::format_chain;
use crate::model::backoff;
use crate::model::external::NoAnswer;
use crate::model::projector::ProjectorId;

/// How long a process may take from its start to the answer to its first message.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a stopped process may take to end before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// The facts that a handler has to know about a projector.
#[derive(Debug)]
pub(super) struct Greeting {
    pub(super) id: ProjectorId,
    pub(super) digest: String,
    pub(super) delivery: &'static str,
    pub(super) events: Vec<String>,
}

/// A process and its command, with which it is started again. It handles one message at a time.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) spec: CommandSpec,
    state: Mutex<State>,
    current: CurrentProjector,
}

#[derive(Debug, Default)]
struct State {
    running: Option<Running>,
    /// How many processes in a row ended before they had answered a batch, a setup or a teardown.
    failures: u32,
}

#[derive(Debug)]
struct Running {
    process: Process,
    /// The projectors for which the process was greeted.
    greeted: HashSet<ProjectorId>,
    last_id: u64,
}

impl Host {
    pub(super) fn new(spec: CommandSpec) -> Self {
        Host { spec, state: Mutex::default(), current: CurrentProjector::default() }
    }

    /// Sends a message for a projector and waits for the answer. `message` gets the message's id.
    ///
    /// If the process does not answer in time, or the future is dropped, the process is killed.
    pub(super) async fn send<'a>(
        &self,
        greeting: &Greeting,
        time_limit: Duration,
        message: impl FnOnce(u64) -> anyhow::Result<Request<'a>>,
    ) -> Result<Response, NoAnswer> {
        let mut state = self.state.lock().await;
        self.current.set(&greeting.id.to_string());
        let mut running = self.start_if_needed(&mut state, greeting).await?;
        let id = running.next_id();
        let line = message(id).and_then(|message| message.to_line());
        let line = match line {
            Ok(line) => line,
            Err(error) => {
                state.running = Some(running);
                return Err(NoAnswer::Unsendable(error));
            }
        };
        // While it works, the process is not in `state`: a dropped future kills it.
        match timeout(time_limit, running.process.exchange(id, &line)).await {
            Ok(Ok(response)) => {
                *state = State { running: Some(running), failures: 0 };
                Ok(response)
            }
            Ok(Err(error)) => {
                state.failures += 1;
                warn!(
                    projector = %greeting.id, command = self.spec.describe(),
                    error = format_chain(&error), "the handler did not answer, and is started again"
                );
                Err(NoAnswer::Ended(error))
            }
            Err(_) => {
                state.failures += 1;
                Err(NoAnswer::TimedOut(time_limit))
            }
        }
    }

    /// Takes the running process, or starts one. Greets it if it does not know the projector yet.
    async fn start_if_needed(
        &self,
        state: &mut State,
        greeting: &Greeting,
    ) -> Result<Running, NoAnswer> {
        let running = state.running.take().and_then(Running::if_alive);
        let mut running = match running {
            Some(running) => running,
            None => {
                if state.failures > 0 {
                    tokio::time::sleep(backoff::delay(state.failures + 1)).await;
                }
                let process = Process::start(&self.spec, &self.current).inspect_err(|_| {
                    state.failures += 1;
                });
                Running {
                    process: process.map_err(NoAnswer::NotStarted)?,
                    greeted: HashSet::new(),
                    last_id: 0,
                }
            }
        };
        if !running.greeted.contains(&greeting.id) {
            let greeted = timeout(START_TIMEOUT, running.greet(greeting)).await;
            let greeted = greeted.unwrap_or_else(|_| {
                let seconds = START_TIMEOUT.as_secs();
                Err(anyhow!("it did not answer `hello` within {seconds} s"))
            });
            let about = || format!("the handler `{}` cannot be used", self.spec.describe());
            greeted.with_context(about).map_err(|error| {
                state.failures += 1;
                NoAnswer::NotStarted(error)
            })?;
        }
        Ok(running)
    }

    /// Stops the process, if it runs.
    pub(super) async fn stop(&self) {
        let running = self.state.lock().await.running.take();
        if let Some(running) = running {
            running.process.stop(STOP_GRACE).await;
        }
    }
}

impl Running {
    /// `None` if the process has ended, for instance because it ends after some batches.
    fn if_alive(mut self) -> Option<Self> {
        self.process.is_running().then_some(self)
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    async fn greet(&mut self, greeting: &Greeting) -> anyhow::Result<()> {
        let id = self.next_id();
        let hello = Request::Hello {
            protocol: PROTOCOL,
            id,
            name: &greeting.id.name,
            version: greeting.id.version,
            digest: &greeting.digest,
            delivery: greeting.delivery,
            events: &greeting.events,
        };
        self.process.exchange(id, &hello.to_line()?).await?.into_hello()?;
        self.greeted.insert(greeting.id.clone());
        Ok(())
    }
}
