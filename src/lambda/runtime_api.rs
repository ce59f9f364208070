//! The interface of the Lambda runtime: invocations come by it, and answers go.
//! <https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html>

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tracing::error;

use crate::model::error::Error;

/// Where Lambda says that it is.
pub(crate) const RUNTIME_API: &str = "AWS_LAMBDA_RUNTIME_API";

/// The longest time-out that a function may have.
const MAX_FUNCTION_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Above the 6 MB that Lambda invokes a function with.
const MAX_EVENT_BYTES: u64 = 16 * 1024 * 1024;

/// An answer is taken by a process on the same host.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// One invocation.
#[derive(Debug)]
pub(crate) struct Invocation {
    id: String,
    /// What it was invoked with.
    pub(crate) event: String,
    /// When Lambda ends it, by the clock of the host.
    deadline: SystemTime,
}

impl Invocation {
    /// How much time is left.
    pub(crate) fn remaining(&self) -> Duration {
        self.deadline.duration_since(SystemTime::now()).unwrap_or_default()
    }
}

/// The runtime's interface. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct RuntimeApi {
    agent: ureq::Agent,
    base_url: Arc<str>,
}

impl RuntimeApi {
    /// Where the environment says that it is.
    ///
    /// # Errors
    /// [`Error::Input`] where it does not.
    pub(crate) fn from_environment() -> Result<Self, Error> {
        let address = std::env::var(RUNTIME_API).map_err(|_| {
            Error::Input(format!("{RUNTIME_API} is not set: this command is what AWS Lambda starts, and sets that for; use play elsewhere"))
        })?;
        // No proxy stands between us and it; and what was open before the process was frozen is not
        // used after.
        let config = ureq::Agent::config_builder().proxy(None).max_idle_connections(0);
        Ok(RuntimeApi { agent: config.build().into(), base_url: base_url(&address).into() })
    }

    /// Waits for the next invocation, for as long as it takes; frozen, most of the time.
    ///
    /// # Errors
    /// [`Error::Unreachable`] where the runtime's interface does not answer as it should.
    pub(crate) async fn next(&self) -> Result<Invocation, Error> {
        let api = self.clone();
        run_on_thread(move || {
            loop {
                match api.fetch_next() {
                    // Emulators say now and then that there is nothing yet.
                    Ok(None) => {}
                    Ok(Some(invocation)) => return Ok(invocation),
                    Err(why) => {
                        return Err(Error::Unreachable(format!(
                            "no invocation comes from the Lambda runtime at {}: {why}",
                            api.base_url
                        )));
                    }
                }
            }
        })
        .await
        .map_err(|error| Error::Unreachable(format!("no thread can be started: {error}")))?
    }

    fn fetch_next(&self) -> Result<Option<Invocation>, String> {
        let url = format!("{}/invocation/next", self.base_url);
        let mut response = self.agent.get(url).call().map_err(|error| error.to_string())?;
        if response.status() == 204 {
            return Ok(None);
        }
        let header = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let id = header("lambda-runtime-aws-request-id").ok_or("it has no request id")?;
        let deadline = header("lambda-runtime-deadline-ms")
            .and_then(|deadline| deadline.parse().ok())
            .ok_or("it has no deadline")?;
        let deadline = parse_deadline(Duration::from_millis(deadline), SystemTime::now());
        let body = response.body_mut().with_config().limit(MAX_EVENT_BYTES).read_to_string();
        Ok(Some(Invocation { id, deadline, event: body.map_err(|error| error.to_string())? }))
    }

    /// Ends an invocation. An answer that is not taken is told: Lambda takes the invocation for
    /// failed then, and messages come again.
    pub(crate) async fn respond(&self, invocation: Invocation, response: Result<Value, Error>) {
        match response {
            Ok(response) => {
                self.post(format!("invocation/{}/response", invocation.id), response).await
            }
            Err(error) => {
                error!(request_id = invocation.id, "the invocation failed: {error}");
                self.post(format!("invocation/{}/error", invocation.id), error_body(&error)).await;
            }
        }
    }

    /// Says that the function cannot be invoked at all.
    pub(crate) async fn report_init_error(&self, error: &Error) {
        self.post("init/error".into(), error_body(error)).await;
    }

    async fn post(&self, path: String, body: Value) {
        let (agent, url) = (self.agent.clone(), format!("{}/{path}", self.base_url));
        let posted = run_on_thread(move || {
            let post = agent.post(url).header("content-type", "application/json");
            let post = match body["errorType"].as_str() {
                Some(kind) => post.header("lambda-runtime-function-error-type", kind),
                None => post,
            };
            let post = post.config().timeout_global(Some(RESPONSE_TIMEOUT)).build();
            post.send(body.to_string()).map(|_| ()).map_err(|error| error.to_string())
        });
        let posted = posted.await.unwrap_or_else(|error| Err(error.to_string()));
        if let Err(why) = posted {
            error!("the Lambda runtime did not take {path}: {why}");
        }
    }
}

/// Lambda names host and port; emulators name a URL.
fn base_url(address: &str) -> String {
    let scheme = if address.contains("://") { "" } else { "http://" };
    format!("{scheme}{}/2018-06-01/runtime", address.trim_end_matches('/'))
}

/// Lambda says when it ends an invocation; emulators say after how long, and no function has longer
/// than this.
fn parse_deadline(deadline: Duration, now: SystemTime) -> SystemTime {
    if deadline <= MAX_FUNCTION_TIMEOUT { now + deadline } else { UNIX_EPOCH + deadline }
}

/// As Lambda shows it to who invoked the function.
fn error_body(error: &Error) -> Value {
    let kind = match error {
        Error::Projector(_)
        | Error::LogFault(_)
        | Error::ForeignMessages(_)
        | Error::Unhealthy(_) => "Projectionist.Failed",
        Error::Input(_) => "Projectionist.Input",
        Error::Unreachable(_) => "Projectionist.Unreachable",
        Error::Interrupted => "Projectionist.Interrupted",
        Error::Database(_) => "Projectionist.Database",
    };
    json!({ "errorType": kind, "errorMessage": error.to_string() })
}

/// On a thread of its own and not of the runtime's: that would wait at its end for one that waits
/// for an invocation.
async fn run_on_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (done, result) = oneshot::channel();
    let run = move || {
        let _ = done.send(work());
    };
    std::thread::Builder::new().name("runtime-api".into()).spawn(run)?;
    result.await.map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_api_address_is_a_host_and_port_or_a_url() {
        assert_eq!(base_url("127.0.0.1:9001"), "http://127.0.0.1:9001/2018-06-01/runtime");
        assert_eq!(base_url("http://[::]:9000/.rt/"), "http://[::]:9000/.rt/2018-06-01/runtime");
    }

    #[test]
    fn a_deadline_is_an_instant_from_lambda_or_a_duration_from_emulators() {
        let now = UNIX_EPOCH + Duration::from_secs(1_795_379_353);
        let moment = Duration::from_millis(1_795_379_360_500);
        assert_eq!(parse_deadline(moment, now), now + Duration::from_millis(7_500));
        assert_eq!(
            parse_deadline(Duration::from_millis(600_000), now),
            now + Duration::from_secs(600)
        );
    }
}
