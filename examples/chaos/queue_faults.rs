//! Faults of the queue: this module receives, deletes and sends messages beside the workers,
//! without a proxy.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::timeout::TimeoutConfig;
use aws_sdk_sqs::types::{Message, QueueAttributeName as Attribute};
use uuid::Uuid;

use crate::figures::Figures;

const QUEUE: &str = "projectionist-chaos";

/// The relay's message group. In a FIFO queue, a received message hides all later ones of its
/// group.
const GROUP: &str = "events";

/// After this many receives, the queue moves a message to the dead-letter queue. Until then, a
/// foreign message blocks its group.
const MAX_RECEIVES: u32 = 10;

/// After this time, every hidden message is visible again.
const FIND_TIMEOUT: Duration = Duration::from_secs(120);

/// The number of message bodies that are remembered, to be sent again.
const MAX_BODIES: usize = 50;

/// The offset in a signed message after `{"sig":"`, 64 digits, and `",`.
const SIGNED_FROM: usize = 74;

/// The start of a payload in a message.
const PAYLOAD: &str = "\"payload\":{";

/// The kind of queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum QueueKind {
    Fifo,
    Standard,
}

impl QueueKind {
    pub fn as_str(self) -> &'static str {
        match self {
            QueueKind::Fifo => "fifo",
            QueueKind::Standard => "standard",
        }
    }
}

pub struct QueueFaults {
    sqs: Client,
    kind: QueueKind,
    pub queue_url: String,
    dead_letters_url: String,
    figures: Arc<Figures>,
    /// Genuine bodies that this module has received.
    seen: Mutex<Vec<String>>,
    /// The bodies that were sent here and are not of the log. Only this module may delete them.
    planted: Mutex<HashSet<String>>,
}

impl QueueFaults {
    /// Creates the queue again.
    pub async fn at(port: u16, kind: QueueKind, figures: &Arc<Figures>) -> anyhow::Result<Self> {
        let config = aws_config::defaults(aws_config::BehaviorVersion::latest())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .endpoint_url(format!("http://127.0.0.1:{port}"))
            .timeout_config(
                TimeoutConfig::builder().operation_timeout(Duration::from_secs(10)).build(),
            )
            .load()
            .await;
        let sqs = Client::new(&config);
        let (name, is_fifo) = match kind {
            QueueKind::Fifo => (format!("{QUEUE}.fifo"), Some("true")),
            QueueKind::Standard => (QUEUE.to_owned(), None),
        };
        if let Ok(left) = sqs.get_queue_url().queue_name(&name).send().await {
            sqs.delete_queue().set_queue_url(left.queue_url).send().await?;
        }
        let dead_name = name.replacen(QUEUE, &format!("{QUEUE}-dead"), 1);
        if let Ok(left) = sqs.get_queue_url().queue_name(&dead_name).send().await {
            sqs.delete_queue().set_queue_url(left.queue_url).send().await?;
        }
        let attributes =
            || is_fifo.map(|is_fifo| HashMap::from([(Attribute::FifoQueue, is_fifo.to_owned())]));
        let dead_letters =
            sqs.create_queue().queue_name(dead_name).set_attributes(attributes()).send().await;
        let dead_letters_url =
            dead_letters.context("LocalStack does not answer")?.queue_url.context("a URL")?;
        let arn = sqs
            .get_queue_attributes()
            .queue_url(&dead_letters_url)
            .attribute_names(Attribute::QueueArn)
            .send()
            .await?;
        let arn = arn
            .attributes()
            .and_then(|all| all.get(&Attribute::QueueArn))
            .context("a queue has an ARN")?
            .clone();
        let policy =
            serde_json::json!({"deadLetterTargetArn": arn, "maxReceiveCount": MAX_RECEIVES})
                .to_string();
        let create = sqs.create_queue().queue_name(name).set_attributes(attributes());
        let created = create.attributes(Attribute::RedrivePolicy, policy).send().await?;
        let queue_url = created.queue_url.context("a queue has a URL")?;
        let (seen, planted) = (Mutex::default(), Mutex::default());
        Ok(QueueFaults {
            sqs,
            kind,
            queue_url,
            dead_letters_url,
            figures: Arc::clone(figures),
            seen,
            planted,
        })
    }

    /// Deletes messages from the queue, so that they are lost.
    pub async fn lose(&self) -> anyhow::Result<()> {
        for message in self.receive(30).await? {
            self.delete(&message).await?;
            self.figures.add("messages_lost", 1);
        }
        Ok(())
    }

    /// Receives messages, and hides them for `duration`. With `then_lose`, deletes them after half
    /// of that time.
    pub async fn hold(&self, duration: Duration, then_lose: bool) -> anyhow::Result<()> {
        let messages = self.receive(duration.as_secs() as i32).await?;
        self.figures.add("messages_delayed", messages.len() as u64);
        if then_lose {
            tokio::time::sleep(duration / 2).await;
            for message in &messages {
                self.delete(message).await?;
                self.figures.add("messages_lost", 1);
            }
        }
        Ok(())
    }

    /// Sends earlier messages again, in random order, each up to three times.
    pub async fn repeat(&self) -> anyhow::Result<()> {
        for message in self.receive(1).await.unwrap_or_default() {
            self.delete(&message).await?;
        }
        let mut bodies: Vec<String> = self.seen.lock().expect("the lock is not poisoned").clone();
        fastrand::shuffle(&mut bodies);
        for body in bodies.iter().take(10) {
            for _ in 0..fastrand::u8(1..4) {
                self.send(body).await?;
                self.figures.add("messages_repeated", 1);
            }
        }
        Ok(())
    }

    /// Sends messages of another log, messages beyond the end of this log, and forged messages.
    pub async fn send_foreign(&self) -> anyhow::Result<()> {
        let event = concat!(
            r#"{"position":7,"event_id":"x","stream_id":"s","stream_version":1,"#,
            r#""event_type":"Closed","recorded_at":"2026-01-01T00:00:00Z","#,
            r#""payload":{"amount":1}}"#,
        );
        let genuine = self.genuine().await?;
        let seen = serde_json::from_str::<serde_json::Value>(&genuine).unwrap_or_default();
        let log = seen["log"].as_str().unwrap_or_default();
        let beyond = event.replace(":7,", ":4000000007,");
        let id = Uuid::now_v7();
        for body in [
            format!(r#"{{"log":"{id}","prev":6,"events":[{event}],"last":7}}"#),
            format!(
                r#"{{"log":"{log}","prev":4000000006,"events":[{}],"last":4000000007}}"#,
                beyond.replace("\"x\"", &format!("\"{id}\""))
            ),
            format!(r#"{{"Records":[{{"eventSource":"aws:s3","id":"{id}"}}]}}"#),
        ] {
            self.plant(body).await?;
            self.figures.add("messages_foreign", 1);
        }
        self.forge(&genuine).await
    }

    /// The body of a message of the log that has payloads.
    async fn genuine(&self) -> anyhow::Result<String> {
        for _ in 0..5 {
            let seen = self.seen.lock().expect("the lock is not poisoned").clone();
            if let Some(body) = seen.into_iter().rfind(|body| body.contains(PAYLOAD)) {
                return Ok(body);
            }
            // The message is visible again after a second.
            self.receive(1).await?;
        }
        bail!("no message with payloads was received")
    }

    /// Sends forged copies of a genuine message, with other payloads: one without a signature, one
    /// with an invented signature, and one with the original signature.
    async fn forge(&self, genuine: &str) -> anyhow::Result<()> {
        let rest = genuine.get(SIGNED_FROM..).context("a genuine message is signed")?;
        let forged = rest.replace(PAYLOAD, &format!("{PAYLOAD}\"forged\":\"{}\",", Uuid::now_v7()));
        let invented = format!("{:032x}{:032x}", fastrand::u128(..), fastrand::u128(..));
        for body in [
            format!("{{{forged}"),
            format!("{{\"sig\":\"{invented}\",{forged}"),
            format!("{}{forged}", &genuine[..SIGNED_FROM]),
        ] {
            self.plant(body).await?;
            self.figures.add("messages_forged", 1);
        }
        Ok(())
    }

    /// Sends messages that cannot be parsed: a truncated one, and nonsense.
    pub async fn send_malformed(&self) -> anyhow::Result<()> {
        let seen = self.seen.lock().expect("the lock is not poisoned").last().cloned();
        let truncated = seen.map(|body| body.chars().take(body.chars().count() / 2).collect());
        let id = Uuid::now_v7();
        let deep = format!("{}{id}", "[".repeat(10_000));
        for body in
            [truncated.unwrap_or(format!("{{\"log\":{id}")), deep, format!("\u{1F4A5} null {id}")]
        {
            self.plant(body).await?;
            self.figures.add("messages_malformed", 1);
        }
        Ok(())
    }

    /// Sends a body that is not of the log, and remembers it.
    async fn plant(&self, body: String) -> anyhow::Result<()> {
        self.send(&body).await?;
        self.planted.lock().expect("the lock is not poisoned").insert(body);
        Ok(())
    }

    /// Empties the queue and the dead-letter queue. Returns the number of planted messages that
    /// another process has deleted. No worker runs any more: genuine messages among the deleted
    /// ones are read from the store.
    pub async fn collect(&self) -> anyhow::Result<usize> {
        let began = Instant::now();
        let mut quiet = 0;
        while quiet < 2 || !self.missing().is_empty() && began.elapsed() < FIND_TIMEOUT {
            quiet += 1;
            for url in [&self.queue_url, &self.dead_letters_url] {
                let receive = self
                    .sqs
                    .receive_message()
                    .queue_url(url)
                    .max_number_of_messages(10)
                    .visibility_timeout(60);
                for message in
                    receive.wait_time_seconds(1).send().await?.messages.unwrap_or_default()
                {
                    quiet = 0;
                    let delete = self.sqs.delete_message().queue_url(url);
                    delete.set_receipt_handle(message.receipt_handle.clone()).send().await?;
                    self.forget(&message);
                }
            }
        }
        Ok(self.missing().len())
    }

    fn missing(&self) -> Vec<String> {
        self.planted.lock().expect("the lock is not poisoned").iter().cloned().collect()
    }

    fn forget(&self, message: &Message) {
        if let Some(body) = message.body() {
            self.planted.lock().expect("the lock is not poisoned").remove(body);
        }
    }

    pub async fn purge(&self) -> anyhow::Result<()> {
        self.sqs.purge_queue().queue_url(&self.queue_url).send().await?;
        // Messages that are in the dead-letter queue already are also forgotten here.
        self.planted.lock().expect("the lock is not poisoned").clear();
        self.figures.add("purges", 1);
        Ok(())
    }

    /// Receives up to ten messages and hides them for `visibility` seconds. Retries, because
    /// workers hold the messages of the group most of the time.
    async fn receive(&self, visibility: i32) -> anyhow::Result<Vec<Message>> {
        for _ in 0..20 {
            let receive =
                self.sqs.receive_message().queue_url(&self.queue_url).max_number_of_messages(10);
            let received =
                receive.visibility_timeout(visibility).wait_time_seconds(1).send().await?;
            let messages = received.messages.unwrap_or_default();
            if !messages.is_empty() {
                let mut seen = self.seen.lock().expect("the lock is not poisoned");
                let planted = self.planted.lock().expect("the lock is not poisoned");
                let bodies = messages.iter().filter_map(|message| message.body.clone());
                seen.extend(
                    bodies.filter(|body| body.starts_with("{\"sig\":") && !planted.contains(body)),
                );
                drop(planted);
                let surplus = seen.len().saturating_sub(MAX_BODIES);
                seen.drain(..surplus);
                return Ok(messages);
            }
        }
        Ok(Vec::new())
    }

    async fn delete(&self, message: &Message) -> anyhow::Result<()> {
        let delete = self.sqs.delete_message().queue_url(&self.queue_url);
        delete.set_receipt_handle(message.receipt_handle.clone()).send().await?;
        self.forget(message);
        Ok(())
    }

    /// Sends a body. In a FIFO queue, the group is the relay's or, so that the message overtakes
    /// others, another one.
    async fn send(&self, body: &str) -> anyhow::Result<()> {
        let send = self.sqs.send_message().queue_url(&self.queue_url).message_body(body);
        let send = match self.kind {
            QueueKind::Fifo => {
                let group = if fastrand::bool() { GROUP } else { "elsewhere" };
                send.message_group_id(group).message_deduplication_id(Uuid::now_v7().to_string())
            }
            QueueKind::Standard => send,
        };
        send.send().await?;
        Ok(())
    }
}
