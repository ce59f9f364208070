//! Who meddles with the queue, behind the workers' backs and by no cable.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::timeout::TimeoutConfig;
use aws_sdk_sqs::types::{Message, QueueAttributeName as Attribute};
use uuid::Uuid;

use crate::figures::Figures;

const QUEUE: &str = "projectionist-chaos";

/// As the relay has it: on a FIFO queue, a message that is received hides all behind it.
const GROUP: &str = "events";

/// Bodies that came by, to be sent again.
const KEPT: usize = 50;

/// What kind of queue it is.
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

pub struct Meddler {
    sqs: Client,
    kind: QueueKind,
    pub queue_url: String,
    figures: Arc<Figures>,
    seen: Mutex<Vec<String>>,
}

impl Meddler {
    /// Makes the queue anew.
    pub async fn at(port: u16, kind: QueueKind, figures: &Arc<Figures>) -> anyhow::Result<Self> {
        let config = aws_config::defaults(aws_config::BehaviorVersion::latest())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .endpoint_url(format!("http://127.0.0.1:{port}"))
            .timeout_config(TimeoutConfig::builder().operation_timeout(Duration::from_secs(10)).build())
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
        let attributes = is_fifo.map(|is_fifo| HashMap::from([(Attribute::FifoQueue, is_fifo.to_owned())]));
        let create = sqs.create_queue().queue_name(name).set_attributes(attributes);
        let created = create.send().await.context("LocalStack does not answer")?;
        let queue_url = created.queue_url.context("a queue has a URL")?;
        Ok(Meddler { sqs, kind, queue_url, figures: Arc::clone(figures), seen: Mutex::default() })
    }

    /// Takes messages out of the queue: lost.
    pub async fn lose(&self) -> anyhow::Result<()> {
        for message in self.receive(30).await? {
            self.delete(&message).await?;
            self.figures.add("messages_lost", 1);
        }
        Ok(())
    }

    /// Takes messages and keeps them for so long: they come late, or never.
    pub async fn hold(&self, duration: Duration, then_lose: bool) -> anyhow::Result<()> {
        let messages = self.receive(duration.as_secs() as i32).await?;
        self.figures.add("messages_held", messages.len() as u64);
        if then_lose {
            tokio::time::sleep(duration / 2).await;
            for message in &messages {
                self.delete(message).await?;
                self.figures.add("messages_lost", 1);
            }
        }
        Ok(())
    }

    /// Sends messages again that came by, in another order, each up to three times.
    pub async fn repeat(&self) -> anyhow::Result<()> {
        for message in self.receive(1).await.unwrap_or_default() {
            self.delete(&message).await?;
        }
        let mut bodies: Vec<String> = self.seen.lock().expect("no panic while meddling").clone();
        fastrand::shuffle(&mut bodies);
        for body in bodies.iter().take(10) {
            for _ in 0..fastrand::u8(1..4) {
                self.send(body).await?;
                self.figures.add("messages_repeated", 1);
            }
        }
        Ok(())
    }

    /// Messages that are none of ours, or beyond the end of our log.
    pub async fn send_foreign(&self) -> anyhow::Result<()> {
        let event = r#"{"position":7,"event_id":"x","stream_id":"s","stream_version":1,"event_type":"Closed","recorded_at":"2026-01-01T00:00:00Z","payload":{"amount":1}}"#;
        let ours = self.seen.lock().expect("no panic while meddling").last().cloned().unwrap_or_default();
        let log = serde_json::from_str::<serde_json::Value>(&ours)
            .ok()
            .and_then(|seen| Some(seen["log"].as_str()?.to_owned()));
        let beyond = event.replace(":7,", ":4000000007,");
        for body in [
            format!(r#"{{"log":"{}","prev":6,"events":[{event}]}}"#, Uuid::now_v7()),
            format!(r#"{{"log":"{}","prev":4000000006,"events":[{beyond}]}}"#, log.unwrap_or_default()),
            r#"{"Records":[{"eventSource":"aws:s3"}]}"#.to_owned(),
        ] {
            self.send(&body).await?;
            self.figures.add("messages_foreign", 1);
        }
        Ok(())
    }

    /// Messages that cannot be read: cut off, or nonsense.
    pub async fn send_malformed(&self) -> anyhow::Result<()> {
        let seen = self.seen.lock().expect("no panic while meddling").last().cloned();
        let cut_off = seen.map(|body| body.chars().take(body.chars().count() / 2).collect());
        let deep = "[".repeat(10_000);
        for body in [cut_off.unwrap_or("{\"log\":".to_owned()), deep, "\u{1F4A5} null".to_owned()] {
            self.send(&body).await?;
            self.figures.add("messages_malformed", 1);
        }
        Ok(())
    }

    pub async fn purge(&self) -> anyhow::Result<()> {
        self.sqs.purge_queue().queue_url(&self.queue_url).send().await?;
        self.figures.add("purges", 1);
        Ok(())
    }

    /// Up to ten messages, hidden for so many seconds. Workers hold those of the one group most of the time: patience.
    async fn receive(&self, visibility: i32) -> anyhow::Result<Vec<Message>> {
        for _ in 0..20 {
            let receive = self.sqs.receive_message().queue_url(&self.queue_url).max_number_of_messages(10);
            let received = receive.visibility_timeout(visibility).wait_time_seconds(1).send().await?;
            let messages = received.messages.unwrap_or_default();
            if !messages.is_empty() {
                let mut seen = self.seen.lock().expect("no panic while meddling");
                seen.extend(messages.iter().filter_map(|message| message.body.clone()));
                let known = seen.len().saturating_sub(KEPT);
                seen.drain(..known);
                return Ok(messages);
            }
        }
        Ok(Vec::new())
    }

    async fn delete(&self, message: &Message) -> anyhow::Result<()> {
        let delete = self.sqs.delete_message().queue_url(&self.queue_url);
        delete.set_receipt_handle(message.receipt_handle.clone()).send().await?;
        Ok(())
    }

    /// On a FIFO queue, to the relay's group or, so that it overtakes, to another.
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
