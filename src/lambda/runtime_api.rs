//! The client of the [Lambda Runtime API]: takes invocations and posts their responses.
//!
//! Why ours: `lambda_runtime` cannot report an error of the initialization, which is where most
//! misconfigurations show. It panics if a header or an environment variable is missing, and it adds
//! 12 crates. `docs/decisions.md` has the figures.
//!
//! [Lambda Runtime API]: https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tracing::error;

use crate::aws::http::{HttpClient, HttpError};
use crate::database::DatabaseError;
use crate::engine::error::Error;
use crate::model::backoff::Transient;

/// The environment variable that names the API's address.
pub(crate) const RUNTIME_API: &str = "AWS_LAMBDA_RUNTIME_API";

/// The longest timeout that Lambda allows a function.
const MAX_FUNCTION_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Above the 6 MB that Lambda allows an event.
const MAX_EVENT_BYTES: usize = 16 * 1024 * 1024;

/// The timeout for posting a response. It is short, because the API is a process on the same host.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// One invocation.
#[derive(Debug)]
pub(crate) struct Invocation {
    id: String,
    /// The event, as JSON.
    pub(crate) event: String,
    /// The deadline, by the host's clock.
    deadline: SystemTime,
}

impl Invocation {
    /// The time that is left until the deadline.
    pub(crate) fn remaining(&self) -> Duration {
        self.deadline.duration_since(SystemTime::now()).unwrap_or_default()
    }
}

/// The Runtime API of one function.
#[derive(Debug)]
pub(crate) struct RuntimeApi {
    client: HttpClient,
    base_url: String,
}

impl RuntimeApi {
    /// The API at the address that the environment names.
    ///
    /// # Errors
    /// [`Error::Input`] if the variable is not set.
    pub(crate) fn from_environment() -> Result<Self, Error> {
        let address = std::env::var(RUNTIME_API).map_err(|_| {
            Error::Input(format!(
                "{RUNTIME_API} is not set: only AWS Lambda, which sets it, can start this command; \
                use play elsewhere"
            ))
        })?;
        Ok(RuntimeApi { client: HttpClient::local(), base_url: base_url(&address) })
    }

    /// Waits for the next invocation, without a time limit. Lambda freezes the process meanwhile.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if the API does not give a valid response.
    pub(crate) async fn next(&self) -> Result<Invocation, Error> {
        loop {
            match self.take().await {
                Ok(Some(invocation)) => return Ok(invocation),
                // An emulator has no invocation yet.
                Ok(None) => {}
                Err(why) => {
                    return Err(Error::Unreachable(format!(
                        "cannot get an invocation from the Lambda runtime at {}: {why}",
                        self.base_url
                    )));
                }
            }
        }
    }

    /// Takes an invocation. Returns `None` if the status is 204.
    async fn take(&self) -> Result<Option<Invocation>, HttpError> {
        let response =
            self.client.get(&format!("{}/invocation/next", self.base_url), MAX_EVENT_BYTES).await?;
        match response.status {
            204 => return Ok(None),
            200..300 => {}
            status => return Err(HttpError::Other(format!("status {status}"))),
        }
        let missing = |what: &str| HttpError::Other(format!("it has no {what}"));
        let id = response
            .header("lambda-runtime-aws-request-id")
            .ok_or_else(|| missing("request id"))?;
        let deadline_ms = response
            .header("lambda-runtime-deadline-ms")
            .and_then(|deadline| deadline.parse().ok())
            .ok_or_else(|| missing("deadline"))?;
        let deadline = parse_deadline(Duration::from_millis(deadline_ms), SystemTime::now());
        Ok(Some(Invocation { id: id.to_owned(), deadline, event: response.body }))
    }

    /// Posts the response of an invocation. A failure to post is logged: Lambda then counts the
    /// invocation as failed, and the messages come again.
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

    /// Reports that the initialization failed.
    pub(crate) async fn report_init_error(&self, error: &Error) {
        self.post("init/error".into(), error_body(error)).await;
    }

    async fn post(&self, path: String, body: Value) {
        let url = format!("{}/{path}", self.base_url);
        let kind =
            body["errorType"].as_str().map(|kind| ("lambda-runtime-function-error-type", kind));
        let posted =
            self.client.post_json(&url, kind.as_slice(), body.to_string(), RESPONSE_TIMEOUT).await;
        let why = match posted {
            Ok(200..300) => return,
            Ok(status) => format!("status {status}"),
            Err(error) => error.to_string(),
        };
        error!("the Lambda runtime did not accept {path}: {why}");
    }
}

/// The base URL. Lambda names host and port; emulators name a URL.
fn base_url(address: &str) -> String {
    let scheme = if address.contains("://") { "" } else { "http://" };
    format!("{scheme}{}/2018-06-01/runtime", address.trim_end_matches('/'))
}

/// The deadline. Lambda gives a moment; emulators give a duration, which is at most
/// [`MAX_FUNCTION_TIMEOUT`].
fn parse_deadline(deadline: Duration, now: SystemTime) -> SystemTime {
    if deadline <= MAX_FUNCTION_TIMEOUT { now + deadline } else { UNIX_EPOCH + deadline }
}

/// The error as Lambda returns it to the caller.
fn error_body(error: &Error) -> Value {
    let kind = match error {
        Error::Projector(_)
        | Error::LogFault(_)
        | Error::ForeignMessages(_)
        | Error::Unhealthy(_) => "Projectionist.Failed",
        Error::Interrupted => "Projectionist.Interrupted",
        error if error.is_transient() => "Projectionist.Unreachable",
        Error::Database(DatabaseError::Statement(_)) => "Projectionist.Database",
        _ => "Projectionist.Input",
    };
    json!({ "errorType": kind, "errorMessage": error.to_string() })
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
