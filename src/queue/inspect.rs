//! What `doctor` asks SQS, without changing anything.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use aws_sdk_sqs::config::interceptors::BeforeDeserializationInterceptorContextRef;
use aws_sdk_sqs::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_sqs::error::{BoxError, ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::primitives::{DateTime, DateTimeFormat};
use aws_sdk_sqs::types::QueueAttributeName as Attribute;

use super::sqs::{SqsQueue, explain};
use super::{QueueError, sqs};

/// What a queue says of itself.
#[derive(Debug)]
pub(crate) struct QueueReport {
    /// By the names that SQS gives them.
    pub(crate) attributes: HashMap<String, String>,
    /// By how many seconds the clock of SQS is ahead of this host's: AWS refuses what is signed
    /// five minutes off.
    pub(crate) clock_ahead_seconds: Option<f64>,
}

/// What became of a call that cannot do anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Permission {
    Granted,
    /// With SQS's own words.
    Denied(String),
    /// Neither refused for want of permission nor for what is wrong with the call itself.
    Unknown(String),
}

/// A receipt that no queue ever gave out.
const INVALID_RECEIPT: &str = "projectionist-doctor";

/// What SQS says of our calls if it may be asked: they are wrong in a way that it looks at after
/// the permission.
const VALIDATION_ERRORS: &[&str] = &[
    "EmptyBatchRequest",
    "ReceiptHandleIsInvalid",
    "InvalidParameterValue",
    "ReadCountOutOfRange",
    "MissingParameter",
];

impl SqsQueue {
    /// All attributes, and the clock.
    pub(crate) async fn inspect(&self) -> Result<QueueReport, QueueError> {
        let clock = Clock::default();
        let asked = SystemTime::now();
        let request =
            self.client.get_queue_attributes().queue_url(&self.url).attribute_names(Attribute::All);
        let answer = request.customize().interceptor(clock.clone()).send().await;
        let answer = answer.map_err(|error| QueueError(explain(&error)))?;
        let here = DateTime::from(asked).as_secs_f64()
            + asked.elapsed().unwrap_or_default().as_secs_f64() / 2.0;
        // The header has no fractions.
        let clock_ahead_seconds = clock.time().map(|time| time.as_secs_f64() + 0.5 - here);
        Ok(QueueReport { attributes: by_name(answer.attributes), clock_ahead_seconds })
    }

    /// The attributes of another queue of the same account and region; `None` where we may not
    /// look.
    pub(crate) async fn dead_letter_queue_attributes(
        &self,
        name: &str,
    ) -> Result<Option<HashMap<String, String>>, QueueError> {
        let url = match self.client.get_queue_url().queue_name(name).send().await {
            Ok(answer) => answer.queue_url.unwrap_or_default(),
            Err(error) if sqs::is_denied(&error) => return Ok(None),
            Err(error) => return Err(QueueError(explain(&error))),
        };
        match self
            .client
            .get_queue_attributes()
            .queue_url(url)
            .attribute_names(Attribute::All)
            .send()
            .await
        {
            Ok(answer) => Ok(Some(by_name(answer.attributes))),
            Err(error) if sqs::is_denied(&error) => Ok(None),
            Err(error) => Err(QueueError(explain(&error))),
        }
    }

    /// Whether each action is allowed, by calls that could not do anything if they were: a batch of
    /// no messages, receipts that are none, a receive of more messages than there can be.
    pub(crate) async fn permissions(&self) -> [(&'static str, Permission); 4] {
        let (client, url) = (&self.client, &self.url);
        let send = client.send_message_batch().queue_url(url).set_entries(Some(Vec::new())).send();
        let receive = client
            .receive_message()
            .queue_url(url)
            .max_number_of_messages(11)
            .visibility_timeout(0)
            .send();
        let delete = client.delete_message().queue_url(url).receipt_handle(INVALID_RECEIPT).send();
        let hide = client
            .change_message_visibility()
            .queue_url(url)
            .receipt_handle(INVALID_RECEIPT)
            .visibility_timeout(0)
            .send();
        let (send, receive, delete, hide) = tokio::join!(send, receive, delete, hide);
        [
            ("SendMessage", classify(send)),
            ("ReceiveMessage", classify(receive)),
            ("DeleteMessage", classify(delete)),
            ("ChangeMessageVisibility", classify(hide)),
        ]
    }
}

/// By the names that SQS gives them.
fn by_name(attributes: Option<HashMap<Attribute, String>>) -> HashMap<String, String> {
    attributes
        .unwrap_or_default()
        .into_iter()
        .map(|(name, value)| (name.as_str().to_owned(), value))
        .collect()
}

fn classify<T, E>(answer: Result<T, SdkError<E>>) -> Permission
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    match answer {
        // Some deletions of nothing are forgiven.
        Ok(_) => Permission::Granted,
        Err(error) if sqs::is_denied(&error) => {
            Permission::Denied(error.message().unwrap_or("access denied").to_owned())
        }
        Err(error)
            if VALIDATION_ERRORS
                .iter()
                .any(|code| error.code().is_some_and(|found| found.contains(code))) =>
        {
            Permission::Granted
        }
        Err(error) => Permission::Unknown(explain(&error)),
    }
}

/// Notes the time that an answer was sent at.
#[derive(Debug, Clone, Default)]
struct Clock(Arc<Mutex<Option<DateTime>>>);

impl Clock {
    fn time(&self) -> Option<DateTime> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Intercept for Clock {
    fn name(&self) -> &'static str {
        "Clock"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        let date = date.and_then(|date| DateTime::from_str(date, DateTimeFormat::HttpDate).ok());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = date;
        Ok(())
    }
}
