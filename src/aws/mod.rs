//! The settings that all AWS calls share, and the two kinds of calls that database credentials
//! need. `queue` has the calls to SQS.

pub(crate) mod http;
mod secret;
mod token;

use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_smithy_http_client::tls;

use crate::model::backoff::Transient;
pub(crate) use secret::{Secret, arn_region};
pub(crate) use token::AuthTokenGenerator;

/// ring on every side (AWS, alerts, MySQL), so that one TLS provider is built.
const TLS: tls::Provider = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);

/// The limit of one attempt of a call, more than the 20 s of the longest poll. Each retry of
/// `AWS_MAX_ATTEMPTS` has the same limit. The SDK limits the connection to 3.1 s of that.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);

/// Why AWS cannot be used, or did not carry out a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AwsError {
    /// A setting is missing or invalid: the region, the credentials, the profile, a secret's
    /// content.
    #[error("{0}")]
    Settings(String),
    /// A service did not answer, or refused the call.
    #[error("{0}")]
    Unavailable(String),
}

impl Transient for AwsError {
    fn is_transient(&self) -> bool {
        matches!(self, AwsError::Unavailable(_))
    }
}

/// Loads credentials, region, endpoint, profile and retries from the usual AWS settings. `region`
/// is used instead of the configured region.
///
/// # Errors
/// [`AwsError::Settings`] if there is neither `region` nor a configured one, or if a setting is
/// invalid.
pub(crate) async fn load_config(region: Option<&str>) -> Result<SdkConfig, AwsError> {
    let http = aws_smithy_http_client::Builder::new().tls_provider(TLS).build_https();
    let mut loader =
        aws_config::defaults(BehaviorVersion::latest()).http_client(http).timeout_config(
            TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT_TIMEOUT).build(),
        );
    if let Some(region) = region {
        loader = loader.region(Region::new(region.to_owned()));
    }
    let load = loader.load();
    // The SDK panics at an invalid setting. The task turns the panic into an error.
    let config = tokio::spawn(load).await.map_err(|_| {
        AwsError::Settings(
            "an AWS setting is invalid; check AWS_MAX_ATTEMPTS (1 or more), AWS_RETRY_MODE \
             (standard or adaptive) and your profile"
                .into(),
        )
    })?;
    match config.region() {
        Some(_) => Ok(config),
        None => Err(AwsError::Settings(
            "no AWS region is known; set AWS_REGION, or a profile that has one".into(),
        )),
    }
}

/// Formats an error and its causes. The SDK's own formatting would append the whole structure.
pub(crate) fn format_error_chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
