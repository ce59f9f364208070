//! The implementation of [`Queue`] for SQS, FIFO or standard.

use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry,
    DeleteMessageBatchRequestEntry, QueueAttributeName as Attribute,
};

use super::{Queue, QueueError, Receipt, ReceivedMessage};
use crate::aws::{self, format_error_chain};

/// All events are one ordered sequence. On a FIFO queue they are therefore one message group.
const MESSAGE_GROUP: &str = "events";

/// The most messages in one receive and the most entries in one batch request.
const MAX_BATCH: usize = 10;

/// One SQS queue. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SqsQueue {
    pub(super) client: Client,
    pub(super) url: String,
    /// The ARN of the queue, or its URL if SQS does not return the ARN.
    identity: String,
    is_fifo: bool,
    visibility_timeout: Duration,
    max_message_bytes: usize,
}

impl SqsQueue {
    /// Connects to the queue at `url` and reads its attributes. The region comes from a URL of AWS.
    /// Credentials, endpoint, and the region of any other URL come from the usual AWS settings.
    /// Received messages are hidden for `visibility_timeout`.
    ///
    /// # Errors
    /// [`QueueError::Settings`] if `url` is not a queue URL. [`QueueError::Aws`] if no region is
    /// known. [`QueueError::Unavailable`] if the queue does not exist, does not answer, or
    /// denies access.
    pub async fn connect(url: &str, visibility_timeout: Duration) -> Result<Self, QueueError> {
        if !url.starts_with("http://") && !url.starts_with("https://") {
            return Err(QueueError::Settings(format!(
                "{url:?} is not a queue URL; it looks like \
                 https://sqs.REGION.amazonaws.com/ACCOUNT/NAME"
            )));
        }
        let config = aws::load_config(queue_region(url)).await?;
        Self::with_client(Client::new(&config), url, visibility_timeout).await.map_err(|error| {
            match config.endpoint_url() {
                Some(endpoint) => {
                    QueueError::Unavailable(format!("{error} (the endpoint is {endpoint})"))
                }
                None => error,
            }
        })
    }

    /// [`SqsQueue::connect`] with an existing client, for programs that configure AWS themselves.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if the queue does not exist, does not answer, or denies access.
    pub async fn with_client(
        client: Client,
        url: &str,
        visibility_timeout: Duration,
    ) -> Result<Self, QueueError> {
        let attributes = client
            .get_queue_attributes()
            .queue_url(url)
            .attribute_names(Attribute::FifoQueue)
            .attribute_names(Attribute::MaximumMessageSize)
            .attribute_names(Attribute::QueueArn)
            .send()
            .await
            .map_err(|error| QueueError::Unavailable(format!("{url}: {}", explain(&error))))?;
        let attribute =
            |name| attributes.attributes().and_then(|all| all.get(&name)).map(String::as_str);
        Ok(SqsQueue {
            url: url.to_owned(),
            identity: attribute(Attribute::QueueArn).unwrap_or(url).to_owned(),
            is_fifo: attribute(Attribute::FifoQueue) == Some("true"),
            // If the queue does not return its limit, use 256 KiB, which every queue accepts.
            max_message_bytes: attribute(Attribute::MaximumMessageSize)
                .and_then(|size| size.parse().ok())
                .unwrap_or(256 * 1024),
            visibility_timeout,
            client,
        })
    }
}

/// Returns the region in a queue URL of AWS, such as `https://sqs.eu-west-1.amazonaws.com/1/orders`
/// or `https://vpce-1.sqs.eu-west-1.vpce.amazonaws.com/1/orders`.
fn queue_region(url: &str) -> Option<&str> {
    let host = url.split("://").nth(1)?.split(['/', ':']).next()?;
    let is_aws = [".amazonaws.com", ".amazonaws.com.cn", ".api.aws"]
        .iter()
        .any(|domain| host.ends_with(domain));
    let labels: Vec<&str> = host.split('.').collect();
    let (service, after) = labels.split_first()?;
    match *service {
        _ if !is_aws => None,
        "sqs" | "sqs-fips" => after.first().copied(),
        // A VPC endpoint has its own name first. The old form of a URL begins with the region.
        endpoint => match after {
            ["sqs" | "sqs-fips", region, ..] => Some(region),
            ["queue", ..] => Some(endpoint),
            _ => None,
        },
    }
}

#[async_trait]
impl Queue for SqsQueue {
    async fn send(&self, body: &str, deduplication_id: &str) -> Result<(), QueueError> {
        let send = self.client.send_message().queue_url(&self.url).message_body(body);
        let send = if self.is_fifo {
            send.message_group_id(MESSAGE_GROUP).message_deduplication_id(deduplication_id)
        } else {
            send
        };
        send.send().await.map(|_| ()).map_err(|error| QueueError::Unavailable(explain(&error)))
    }

    async fn receive(&self, wait: Duration) -> Result<Vec<ReceivedMessage>, QueueError> {
        let received = self
            .client
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(MAX_BATCH as i32)
            .wait_time_seconds(wait.as_secs().min(20) as i32)
            .visibility_timeout(self.visibility_timeout.as_secs() as i32)
            .send()
            .await
            .map_err(|error| QueueError::Unavailable(explain(&error)))?;
        let messages = received.messages.unwrap_or_default().into_iter();
        Ok(messages
            .filter_map(|message| {
                let id = message.message_id.unwrap_or_default();
                Some(ReceivedMessage { receipt: message.receipt_handle?, id, body: message.body? })
            })
            .collect())
    }

    async fn delete(&self, receipts: &[Receipt]) -> Result<(), QueueError> {
        for batch in receipts.chunks(MAX_BATCH) {
            let mut request = self.client.delete_message_batch().queue_url(&self.url);
            for (index, receipt) in batch.iter().enumerate() {
                let entry = DeleteMessageBatchRequestEntry::builder()
                    .id(index.to_string())
                    .receipt_handle(receipt);
                request = request.entries(
                    entry.build().map_err(|error| QueueError::Unavailable(error.to_string()))?,
                );
            }
            let answer =
                request.send().await.map_err(|error| QueueError::Unavailable(explain(&error)))?;
            check_batch("delete", answer.failed())?;
        }
        Ok(())
    }

    async fn change_visibility(
        &self,
        receipts: &[Receipt],
        duration: Duration,
    ) -> Result<(), QueueError> {
        for batch in receipts.chunks(MAX_BATCH) {
            let mut request = self.client.change_message_visibility_batch().queue_url(&self.url);
            for (index, receipt) in batch.iter().enumerate() {
                let entry = ChangeMessageVisibilityBatchRequestEntry::builder()
                    .id(index.to_string())
                    .receipt_handle(receipt)
                    .visibility_timeout(duration.as_secs() as i32);
                request = request.entries(
                    entry.build().map_err(|error| QueueError::Unavailable(error.to_string()))?,
                );
            }
            let answer =
                request.send().await.map_err(|error| QueueError::Unavailable(explain(&error)))?;
            check_batch("hide", answer.failed())?;
        }
        Ok(())
    }

    async fn depth(&self) -> Result<u64, QueueError> {
        let counts = [
            Attribute::ApproximateNumberOfMessages,
            Attribute::ApproximateNumberOfMessagesNotVisible,
            Attribute::ApproximateNumberOfMessagesDelayed,
        ];
        let answer = self
            .client
            .get_queue_attributes()
            .queue_url(&self.url)
            .set_attribute_names(Some(counts.to_vec()))
            .send()
            .await
            .map_err(|error| QueueError::Unavailable(explain(&error)))?;
        let values = answer.attributes().map(|all| all.values()).into_iter().flatten();
        Ok(values.filter_map(|count| count.parse::<u64>().ok()).sum())
    }

    fn is_ordered(&self) -> bool {
        self.is_fifo
    }

    fn identity(&self) -> Option<String> {
        Some(self.identity.clone())
    }

    fn visibility_timeout(&self) -> Duration {
        self.visibility_timeout
    }

    fn max_message_bytes(&self) -> usize {
        self.max_message_bytes
    }
}

/// Returns an error if an entry of a batch failed, unless its receipt has expired (a sender fault).
/// AWS ignores expired receipts and LocalStack does not. Such a message is delivered again and
/// recognized by its positions.
fn check_batch(doing: &str, failed: &[BatchResultErrorEntry]) -> Result<(), QueueError> {
    for entry in failed {
        tracing::debug!(
            code = entry.code(),
            reason = entry.message(),
            "could not {doing} a message; SQS delivers it again"
        );
    }
    match failed.iter().find(|entry| !entry.sender_fault()) {
        Some(entry) => Err(QueueError::Unavailable(format!(
            "could not {doing} a message: {}",
            entry.message().unwrap_or("no reason")
        ))),
        None => Ok(()),
    }
}

/// Whether the error is about the KMS key that encrypts the queue.
pub(super) fn is_about_kms<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    // The JSON protocol has `KmsAccessDenied`, the older one `KMS.AccessDeniedException`.
    error.code().is_some_and(|code| code.to_ascii_lowercase().starts_with("kms"))
}

/// Whether AWS denied access.
pub(super) fn is_denied<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    error.code().is_some_and(|code| code.contains("AccessDenied"))
}

/// Formats an error, with advice if its cause is known.
pub(super) fn explain<E>(error: &SdkError<E>) -> String
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    let code = error.code().unwrap_or_default();
    if code.ends_with("QueueDoesNotExist") || code.ends_with("NonExistentQueue") {
        return "it does not exist; create it, or correct the queue URL (and the region)".into();
    }
    if is_about_kms(error) {
        let message = error.message().unwrap_or(code);
        return if is_denied(error) {
            format!(
                "{message}; allow kms:GenerateDataKey and kms:Decrypt (sending) and kms:Decrypt \
                 (receiving) on the queue's KMS key, in the role and in the key's policy"
            )
        } else {
            format!(
                "{code}: {message}; check the queue's KMS key (KmsMasterKeyId): its state, \
                     its policy and its limits"
            )
        };
    }
    if is_denied(error) {
        return format!(
            "{}; allow sqs:GetQueueAttributes, SendMessage, ReceiveMessage, DeleteMessage and \
             ChangeMessageVisibility on it",
            error.message().unwrap_or(code)
        );
    }
    match error {
        // A proxy or a load balancer answered, and not SQS.
        SdkError::ServiceError(_) if code.is_empty() => format!(
            "the endpoint answered with HTTP status {}, and not as SQS does; check the endpoint \
             (AWS_ENDPOINT_URL) and the proxy",
            error.raw_response().map_or(0, |response| response.status().as_u16())
        ),
        SdkError::ServiceError(_) => match error.message() {
            Some(message) => format!("{code}: {message}"),
            None => code.to_owned(),
        },
        SdkError::DispatchFailure(_) | SdkError::TimeoutError(_) => {
            format!(
                "{}; check the endpoint (AWS_ENDPOINT_URL), the credentials and the network",
                format_error_chain(error)
            )
        }
        _ => format_error_chain(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_region_comes_from_a_queue_url_of_aws() {
        for (url, region) in [
            ("https://sqs.eu-west-1.amazonaws.com/123456789012/orders", Some("eu-west-1")),
            ("https://sqs-fips.us-east-2.amazonaws.com/1/orders.fifo", Some("us-east-2")),
            ("https://sqs.cn-north-1.amazonaws.com.cn/1/orders", Some("cn-north-1")),
            ("https://sqs.us-east-1.api.aws/1/orders", Some("us-east-1")),
            ("https://vpce-1.sqs.eu-west-1.vpce.amazonaws.com/1/orders", Some("eu-west-1")),
            ("https://eu-west-1.queue.amazonaws.com/1/orders", Some("eu-west-1")),
            ("http://127.0.0.1:4566/000000000000/orders", None),
            ("http://sqs.us-east-1.localhost.localstack.cloud:4566/1/orders", None),
            ("https://amazonaws.com/1/orders", None),
            ("https://", None),
        ] {
            assert_eq!(queue_region(url), region, "{url}");
        }
    }

    /// AWS reports other failures in a batch, too; LocalStack reports only sender faults.
    #[test]
    fn a_partly_failed_batch_is_an_error_unless_only_receipts_expired() {
        let entry = |sender_fault, code| {
            let entry = BatchResultErrorEntry::builder()
                .id("0")
                .sender_fault(sender_fault)
                .code(code)
                .message("the reason");
            entry.build().expect("the entry is complete")
        };
        let expired = entry(true, "ReceiptHandleIsInvalid");
        assert!(
            check_batch("delete", &[]).is_ok()
                && check_batch("delete", std::slice::from_ref(&expired)).is_ok()
        );
        let refused = check_batch("delete", &[expired, entry(false, "InternalError")])
            .expect_err("the failure is not a sender fault");
        assert_eq!(refused.to_string(), "could not delete a message: the reason");
    }
}
