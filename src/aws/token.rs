//! IAM tokens, with which RDS authenticates a user instead of a password.
//!
//! Why ours: the SDK's token generator is in `aws-sdk-rds`, the whole API of RDS. The signing
//! itself is done by `aws-sigv4`.

use std::fmt;
use std::time::{Duration, SystemTime};

use aws_config::{Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_sigv4::http_request::{
    SignableBody, SignableRequest, SignatureLocation, SigningSettings, sign,
};
use aws_sigv4::sign::v4::SigningParams;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::{AwsError, format_error_chain};

/// How long RDS accepts a token. A token is only needed to connect; connections outlive it.
const VALID_FOR: Duration = Duration::from_secs(15 * 60);

/// Tokens are renewed from this age on. The margin allows for clock differences and slow
/// connections.
const RENEW_AFTER: Duration = Duration::from_secs(10 * 60);

/// Every character that RFC 3986 does not define as unreserved.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Generates tokens with the current AWS credentials.
#[derive(Clone)]
pub(crate) struct AuthTokenGenerator {
    credentials: SharedCredentialsProvider,
    region: Region,
}

/// A token, and when to generate the next one.
pub(crate) struct AuthToken {
    pub(crate) text: String,
    pub(crate) renew_at: SystemTime,
}

impl fmt::Debug for AuthTokenGenerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthTokenGenerator").field("region", &self.region).finish_non_exhaustive()
    }
}

impl AuthTokenGenerator {
    /// Creates a generator with the credentials and the region of `config`.
    ///
    /// # Errors
    /// [`AwsError::Settings`] if no credentials or no region are configured.
    pub(crate) fn new(config: &SdkConfig) -> Result<Self, AwsError> {
        let missing = || {
            AwsError::Settings(
                "IAM authentication needs AWS credentials and a region; configure both".into(),
            )
        };
        Ok(AuthTokenGenerator {
            credentials: config.credentials_provider().ok_or_else(missing)?,
            region: config.region().cloned().ok_or_else(missing)?,
        })
    }

    /// Generates a token for a user of a server. The host must be the instance's or cluster's own
    /// name, because the signature covers it.
    ///
    /// # Errors
    /// With the cause and what to do.
    pub(crate) async fn generate(
        &self,
        host: &str,
        port: u16,
        user: &str,
    ) -> Result<AuthToken, AwsError> {
        let credentials = self.credentials.provide_credentials().await;
        let credentials = credentials.map_err(|error| {
            AwsError::Unavailable(format!(
                "there are no AWS credentials to sign with: {}; \
                 set a task role, a profile or AWS_ACCESS_KEY_ID",
                format_error_chain(&error)
            ))
        })?;
        let now = SystemTime::now();
        let fresh = now + RENEW_AFTER;
        let renew_at = credentials.expiry().map_or(fresh, |expiry| expiry.min(fresh));
        let text =
            presign(credentials, self.region.as_ref(), host, port, user, now).map_err(|error| {
                AwsError::Unavailable(format!(
                    "the token cannot be signed: {}",
                    format_error_chain(error.as_ref())
                ))
            })?;
        Ok(AuthToken { text, renew_at })
    }
}

/// Builds a presigned URL for the action `rds-db:connect`, without the scheme.
fn presign(
    credentials: Credentials,
    region: &str,
    host: &str,
    port: u16,
    user: &str,
    at: SystemTime,
) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    let mut settings = SigningSettings::default();
    settings.signature_location = SignatureLocation::QueryParams;
    settings.expires_in = Some(VALID_FOR);
    let identity = credentials.into();
    let parameters =
        SigningParams::builder().identity(&identity).region(region).name("rds-db").time(at);
    let parameters = parameters.settings(settings).build()?.into();
    let mut url = format!(
        "https://{host}:{port}/?Action=connect&DBUser={}",
        utf8_percent_encode(user, RESERVED)
    );
    let request = SignableRequest::new("GET", &url, std::iter::empty(), SignableBody::Bytes(b""))?;
    let (instructions, _) = sign(request, &parameters)?.into_parts();
    for (name, value) in instructions.params() {
        url.push_str(&format!("&{name}={}", utf8_percent_encode(value, RESERVED)));
    }
    Ok(url.trim_start_matches("https://").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-22T19:58:35Z in seconds since 1970.
    const AT: u64 = 1_795_377_515;
    const KEY: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";

    fn parts(token: &str) -> (&str, Vec<&str>) {
        let (place, query) = token.split_once('?').expect("a query");
        let mut query: Vec<&str> = query.split('&').collect();
        query.sort_unstable();
        (place, query)
    }

    /// The expected tokens come from `generate_db_auth_token` of botocore 1.42.34.
    #[test]
    fn a_token_is_signed_as_botocore_signs_it() {
        let known = [
            (
                Credentials::new("AKIDEXAMPLE", KEY, None, None, "test"),
                ("us-east-1", "db.abcdefghijkl.us-east-1.rds.amazonaws.com", 3306, "projectionist"),
                "db.abcdefghijkl.us-east-1.rds.amazonaws.com:3306/?Action=connect&DBUser=projectionist\
                 &X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20261122%2Fus-east-1%2Frds-db%2Faws4_request\
                 &X-Amz-Date=20261122T195835Z&X-Amz-SignedHeaders=host&X-Amz-Expires=900\
                 &X-Amz-Signature=8420177824ae5ab5056289e327eee4493575de3cbc30aed809e3a8ef7501d194",
            ),
            (
                Credentials::new(
                    "ASIAEXAMPLE",
                    KEY,
                    Some("IQoJb3JpZ2luX2VjE/example+token==".into()),
                    None,
                    "test",
                ),
                (
                    "eu-central-1",
                    "db.cluster-abc.eu-central-1.rds.amazonaws.com",
                    3307,
                    "jane doe+1",
                ),
                "db.cluster-abc.eu-central-1.rds.amazonaws.com:3307/?Action=connect&DBUser=jane%20doe%2B1\
                 &X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=ASIAEXAMPLE%2F20261122%2Feu-central-1%2Frds-db%2Faws4_request\
                 &X-Amz-Date=20261122T195835Z&X-Amz-SignedHeaders=host&X-Amz-Expires=900\
                 &X-Amz-Security-Token=IQoJb3JpZ2luX2VjE%2Fexample%2Btoken%3D%3D\
                 &X-Amz-Signature=40ad3f7ca8b363e8b0af7003bfd73d92390c37e8f5c0cd07957aaf7d6bd53489",
            ),
        ];
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(AT);
        for (credentials, (region, host, port, user), token) in known {
            let ours = presign(credentials, region, host, port, user, at).expect("signed");
            assert_eq!(parts(&ours), parts(token));
        }
    }

    #[tokio::test]
    async fn a_token_expires_with_the_credentials_that_signed_it() {
        let soon = SystemTime::now() + Duration::from_secs(60);
        for (expiry, is_short) in [(Some(soon), true), (None, false)] {
            let credentials = Credentials::new("AKIDEXAMPLE", KEY, None, expiry, "test");
            let tokens = AuthTokenGenerator {
                credentials: SharedCredentialsProvider::new(credentials),
                region: Region::new("us-east-1"),
            };
            let token = tokens.generate("db.example.com", 3306, "app").await.expect("a token");
            assert_eq!(token.renew_at <= soon, is_short);
        }
    }
}
