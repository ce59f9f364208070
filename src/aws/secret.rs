//! Reads secrets of Secrets Manager.

use aws_config::{Region, SdkConfig};
use aws_sdk_secretsmanager::Client;
use aws_sdk_secretsmanager::config::Builder;
use aws_sdk_secretsmanager::error::{ProvideErrorMetadata, SdkError};

use super::{AwsError, format_error_chain};

/// A secret's location. Cheap to clone. The text of the secret is not stored.
#[derive(Debug, Clone)]
pub(crate) struct Secret {
    client: Client,
    /// The ARN or name of the secret.
    pub(crate) id: String,
}

impl Secret {
    /// `id` is the ARN of the secret, or its name in the region of `config`.
    pub(crate) fn new(config: &SdkConfig, id: &str) -> Self {
        let mut builder = Builder::from(config);
        if let Some(region) = arn_region(id) {
            builder = builder.region(Region::new(region.to_owned()));
        }
        Secret { client: Client::from_conf(builder.build()), id: id.to_owned() }
    }

    /// Reads the current text of the secret.
    ///
    /// # Errors
    /// With the cause and what to do. The message never contains the text.
    pub(crate) async fn read(&self) -> Result<String, AwsError> {
        let read = self.client.get_secret_value().secret_id(&self.id).send().await;
        let read = read.map_err(|error| {
            let reason = explain(&error);
            AwsError::Unavailable(format!("the secret {} cannot be read: {reason}", self.id))
        })?;
        read.secret_string.ok_or_else(|| {
            AwsError::Settings(format!("the secret {} is binary; it must be text", self.id))
        })
    }
}

/// Returns the region in an ARN.
pub(crate) fn arn_region(id: &str) -> Option<&str> {
    let mut parts = id.split(':');
    (parts.next() == Some("arn"))
        .then(|| parts.nth(2))
        .flatten()
        .filter(|region| !region.is_empty())
}

fn explain<E>(error: &SdkError<E>) -> String
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    let code = error.code().unwrap_or_default();
    let message = error.message().unwrap_or(code);
    match error {
        SdkError::ServiceError(_) if code.contains("AccessDenied") => {
            format!(
                "{message}; allow secretsmanager:GetSecretValue on it, and kms:Decrypt if its \
                 key is your own"
            )
        }
        SdkError::ServiceError(_) if code.contains("DecryptionFailure") => {
            format!("{message}; allow kms:Decrypt on the KMS key that encrypts it")
        }
        SdkError::ServiceError(_) if code.contains("ResourceNotFound") => {
            "it does not exist; correct its ARN or name (and the region)".into()
        }
        // A proxy or a load balancer answered, and not Secrets Manager.
        SdkError::ServiceError(_) if code.is_empty() => format!(
            "the endpoint answered with HTTP status {}, and not as Secrets Manager does; check \
             the endpoint (AWS_ENDPOINT_URL) and the proxy",
            error.raw_response().map_or(0, |response| response.status().as_u16())
        ),
        SdkError::ServiceError(_) => format!("{code}: {message}"),
        _ => format!(
            "{}; check the endpoint (AWS_ENDPOINT_URL), the credentials and the network",
            format_error_chain(error)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secrets_region_comes_from_its_arn() {
        let arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:projectionist-AbCdEf";
        assert_eq!(arn_region(arn), Some("eu-west-1"));
        for name in ["projectionist", "arn", "arn:aws", "rds!db-1", "a:b:c:d"] {
            assert_eq!(arn_region(name), None, "{name}");
        }
    }
}
