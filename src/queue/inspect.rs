//! The read-only queries with which `doctor` examines SQS.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use aws_sdk_sqs::config::interceptors::BeforeDeserializationInterceptorContextRef;
use aws_sdk_sqs::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_sqs::error::{BoxError, ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::primitives::{DateTime, DateTimeFormat};
use aws_sdk_sqs::types::QueueAttributeName as Attribute;

use super::sqs::{SqsQueue, explain};
use super::{QueueError, sqs};

/// The attributes of a queue, and the difference of the clocks.
#[derive(Debug)]
pub(crate) struct QueueReport {
    /// The attributes, by their SQS names.
    pub(crate) attributes: HashMap<String, String>,
    /// How many seconds the clock of SQS is ahead of this host's clock. AWS refuses a request whose
    /// signature is more than five minutes off.
    pub(crate) clock_ahead_seconds: Option<f64>,
}

/// Whether an action is allowed, as found out by a call without effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Permission {
    Granted,
    /// SQS denied access. The text is its message.
    Denied(String),
    /// The queue's KMS key cannot be used. The text says what to allow.
    KeyUnusable(String),
    /// The call failed for a reason that says nothing about the permission.
    Unknown(String),
}

/// The actions on the queue that each command needs, besides `GetQueueAttributes`. Other commands
/// do not use the queue. The role of `lambda` is used by the event source mapping, too, which
/// receives and deletes; the mapping's visibility timeout is the queue's.
const COMMAND_ACTIONS: &[(&str, &[Action])] = &[
    (
        "play",
        &[
            Action::SendMessage,
            Action::ReceiveMessage,
            Action::DeleteMessage,
            Action::ChangeMessageVisibility,
        ],
    ),
    ("lambda", &[Action::SendMessage, Action::ReceiveMessage, Action::DeleteMessage]),
    ("relay", &[Action::SendMessage]),
];

/// An action that IAM allows or denies on the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Action {
    SendMessage,
    ReceiveMessage,
    DeleteMessage,
    ChangeMessageVisibility,
}

impl Action {
    /// The actions that at least one of these commands needs, or `None` if none of them uses the
    /// queue.
    pub(crate) fn of_commands(commands: &[String]) -> Option<BTreeSet<Action>> {
        let of =
            COMMAND_ACTIONS.iter().filter(|(command, _)| commands.iter().any(|c| c == command));
        let mut of = of.map(|(_, actions)| *actions).peekable();
        of.peek()?;
        Some(of.flatten().copied().collect())
    }

    /// The action's name in policies, without its service.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Action::SendMessage => "SendMessage",
            Action::ReceiveMessage => "ReceiveMessage",
            Action::DeleteMessage => "DeleteMessage",
            Action::ChangeMessageVisibility => "ChangeMessageVisibility",
        }
    }
}

/// A receipt that no queue has issued.
const INVALID_RECEIPT: &str = "projectionist-doctor";

/// The errors with which SQS refuses our invalid calls after it has granted access: it checks
/// permissions before parameters.
const VALIDATION_ERRORS: &[&str] = &[
    "EmptyBatchRequest",
    "ReceiptHandleIsInvalid",
    "InvalidParameterValue",
    "ReadCountOutOfRange",
    "MissingParameter",
];

impl SqsQueue {
    /// Reads all attributes, and compares the clocks.
    pub(crate) async fn inspect(&self) -> Result<QueueReport, QueueError> {
        let clock = Clock::default();
        let asked = SystemTime::now();
        let request =
            self.client.get_queue_attributes().queue_url(&self.url).attribute_names(Attribute::All);
        let answer = request.customize().interceptor(clock.clone()).send().await;
        let answer = answer.map_err(|error| QueueError::Unavailable(explain(&error)))?;
        let here = DateTime::from(asked).as_secs_f64()
            + asked.elapsed().unwrap_or_default().as_secs_f64() / 2.0;
        // The date header has whole seconds: half a second is the expected remainder.
        let clock_ahead_seconds = clock.time().map(|time| time.as_secs_f64() + 0.5 - here);
        Ok(QueueReport { attributes: by_name(answer.attributes), clock_ahead_seconds })
    }

    /// Reads the attributes of a queue in the same account and region. `None` if access is denied.
    pub(crate) async fn dead_letter_queue_attributes(
        &self,
        name: &str,
    ) -> Result<Option<HashMap<String, String>>, QueueError> {
        let url = match self.client.get_queue_url().queue_name(name).send().await {
            Ok(answer) => answer.queue_url.unwrap_or_default(),
            Err(error) if sqs::is_denied(&error) => return Ok(None),
            Err(error) => return Err(QueueError::Unavailable(explain(&error))),
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
            Err(error) => Err(QueueError::Unavailable(explain(&error))),
        }
    }

    /// Checks whether an action is allowed, with a call that has no effect even then: an empty
    /// batch, an invalid receipt, or a receive of more messages than SQS allows.
    pub(crate) async fn permission(&self, action: Action) -> Permission {
        let (client, url) = (&self.client, &self.url);
        match action {
            Action::SendMessage => classify(
                client
                    .send_message_batch()
                    .queue_url(url)
                    .set_entries(Some(Vec::new()))
                    .send()
                    .await,
            ),
            Action::ReceiveMessage => classify(
                client
                    .receive_message()
                    .queue_url(url)
                    .max_number_of_messages(11)
                    .visibility_timeout(0)
                    .send()
                    .await,
            ),
            Action::DeleteMessage => classify(
                client.delete_message().queue_url(url).receipt_handle(INVALID_RECEIPT).send().await,
            ),
            Action::ChangeMessageVisibility => classify(
                client
                    .change_message_visibility()
                    .queue_url(url)
                    .receipt_handle(INVALID_RECEIPT)
                    .visibility_timeout(0)
                    .send()
                    .await,
            ),
        }
    }
}

/// Keys the attributes by their SQS names.
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
        // SQS may accept the deletion of an unknown receipt.
        Ok(_) => Permission::Granted,
        Err(error) if sqs::is_about_kms(&error) => Permission::KeyUnusable(explain(&error)),
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

/// Records the date header of a response.
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
