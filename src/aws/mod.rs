//! What every call of AWS has in common, and the two of them that the way into the database needs.
//! The queue's are beside it.

pub(crate) mod http;
mod secret;
mod token;

use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_smithy_http_client::tls;

use crate::model::error::Error;
pub(crate) use secret::Secret;
pub(crate) use token::AuthTokenGenerator;

/// ring on every side (AWS, alerts, MySQL), so that one TLS provider is built.
const TLS: tls::Provider = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);

/// Above the 20 s of the longest poll: an answer that takes longer will not come. A try has this,
/// and the retries of `AWS_MAX_ATTEMPTS` have it each; 3.1 s of it, the SDK's own bound, are for
/// the connection.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);

/// Credentials, region, endpoint, profile and retries as every AWS tool takes them.
///
/// # Errors
/// [`Error::Input`] where no region is known, or where a setting is none.
pub(crate) async fn load_config() -> Result<SdkConfig, Error> {
    let http = aws_smithy_http_client::Builder::new().tls_provider(TLS).build_https();
    let load = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http)
        .timeout_config(TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT_TIMEOUT).build())
        .load();
    // The SDK panics at a setting that it cannot read.
    let config = tokio::spawn(load).await.map_err(|_| {
        Error::Input(
            "an AWS setting cannot be read; look at AWS_MAX_ATTEMPTS (1 or more), AWS_RETRY_MODE (standard or \
                      adaptive) and your profile"
                .into(),
        )
    })?;
    match config.region() {
        Some(_) => Ok(config),
        None => Err(Error::Input(
            "no AWS region is known; set AWS_REGION, or a profile that has one".into(),
        )),
    }
}

/// An error and its causes, for people: the SDK's own way prints the whole structure after them.
pub(crate) fn format_error_chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
