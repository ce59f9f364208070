//! The measured queues, of LocalStack and of the stub.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use aws_config::BehaviorVersion;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{QueueAttributeName, SendMessageBatchRequestEntry};
use projectionist::SqsQueue;

/// The default of the commands.
const VISIBILITY: Duration = Duration::from_secs(30);

/// The limits of one batch.
const MAX_BATCH_MESSAGES: usize = 10;
const MAX_BATCH_BYTES: usize = 1_000_000;

/// Numbers queues and messages, so that their names and deduplication ids are unique.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(0);

/// A server that speaks the protocol of SQS.
pub struct Endpoint {
    pub name: &'static str,
    client: Client,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Fifo,
    Standard,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Fifo => "FIFO",
            Kind::Standard => "standard",
        }
    }
}

impl Endpoint {
    pub async fn new(name: &'static str, url: &str) -> Self {
        let config = aws_config::defaults(BehaviorVersion::latest())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .region("us-east-1")
            .endpoint_url(url)
            .test_credentials()
            .load()
            .await;
        Endpoint { name, client: Client::new(&config) }
    }

    /// Makes a new queue, which remembers no deduplication id of an earlier round.
    pub async fn make_queue(&self, kind: Kind) -> anyhow::Result<LiveQueue> {
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{number}", prefix());
        let create = match kind {
            Kind::Fifo => self
                .client
                .create_queue()
                .queue_name(format!("{name}.fifo"))
                .attributes(QueueAttributeName::FifoQueue, "true"),
            Kind::Standard => self.client.create_queue().queue_name(name),
        };
        let created =
            create.send().await.with_context(|| format!("{} does not answer", self.name))?;
        let url = created.queue_url.context("the created queue has no URL")?;
        let sqs = SqsQueue::with_client(self.client.clone(), &url, VISIBILITY).await?;
        Ok(LiveQueue { kind, client: self.client.clone(), url, sqs: Arc::new(sqs) })
    }

    /// Deletes the queues that an interrupted bench has left.
    pub async fn clear(&self) -> anyhow::Result<()> {
        let left = self.client.list_queues().queue_name_prefix(prefix()).send().await?;
        for url in left.queue_urls.unwrap_or_default() {
            self.client.delete_queue().queue_url(url).send().await?;
        }
        Ok(())
    }
}

/// The prefix of the queues of this process.
fn prefix() -> String {
    format!("bench-{}-", std::process::id())
}

/// One queue. Play and the bare loop use it through the same client.
pub struct LiveQueue {
    kind: Kind,
    client: Client,
    url: String,
    pub sqs: Arc<SqsQueue>,
}

impl LiveQueue {
    /// Sends messages in order, as fast as possible.
    pub async fn fill(&self, bodies: &[String]) -> anyhow::Result<()> {
        for batch in batches(bodies) {
            let mut send = self.client.send_message_batch().queue_url(&self.url);
            for (index, body) in batch.iter().enumerate() {
                let entry = SendMessageBatchRequestEntry::builder()
                    .id(index.to_string())
                    .message_body(body);
                let entry = match self.kind {
                    Kind::Fifo => {
                        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
                        entry
                            .message_group_id("events")
                            .message_deduplication_id(number.to_string())
                    }
                    Kind::Standard => entry,
                };
                send = send.entries(entry.build()?);
            }
            let sent = send.send().await.context("filling the queue")?;
            ensure!(sent.failed().is_empty(), "filling the queue: {:?}", sent.failed());
        }
        Ok(())
    }

    pub async fn remove(self) -> anyhow::Result<()> {
        self.client
            .delete_queue()
            .queue_url(&self.url)
            .send()
            .await
            .context("deleting the queue")?;
        Ok(())
    }
}

fn batches(bodies: &[String]) -> Vec<&[String]> {
    let (mut batches, mut rest) = (Vec::new(), bodies);
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = rest.iter().take(MAX_BATCH_MESSAGES).take_while(|body| {
            bytes += body.len();
            bytes <= MAX_BATCH_BYTES
        });
        let (batch, others) = rest.split_at(fits.count().max(1));
        batches.push(batch);
        rest = others;
    }
    batches
}
