//! The queues of the stub. They keep order, receipts and visibility timeouts.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// The most messages in one receive.
const MAX_RECEIVED: usize = 10;

#[derive(Default)]
pub struct Queues(Mutex<HashMap<String, Arc<Queue>>>);

/// One queue. Messages are numbered in the order of their arrival, and are received in that order.
struct Queue {
    is_fifo: bool,
    messages: Mutex<Messages>,
    /// Notified when a receive may find messages.
    changed: Notify,
}

#[derive(Default)]
struct Messages {
    last: u64,
    visible: BTreeMap<u64, String>,
    hidden: BTreeMap<u64, (Instant, String)>,
}

type Response = Result<Value, &'static str>;

impl Queues {
    pub async fn handle(self: &Arc<Self>, target: String, body: Value) -> Response {
        if target == "CreateQueue" {
            return self.create(body["QueueName"].as_str().unwrap_or_default());
        }
        let queue = self.find(&body).ok_or("QueueDoesNotExist")?;
        match target.as_str() {
            "DeleteQueue" => {
                lock(&self.0).remove(body["QueueUrl"].as_str().unwrap_or_default());
                Ok(json!({}))
            }
            "GetQueueAttributes" => Ok(queue.attributes()),
            "SendMessage" => Ok(queue.send(&body)),
            "SendMessageBatch" => Ok(batch(&body, |entry| queue.send(entry))),
            "ReceiveMessage" => Ok(queue.receive(&body).await),
            "DeleteMessageBatch" => Ok(batch(&body, |entry| queue.delete(entry))),
            "ChangeMessageVisibilityBatch" => Ok(batch(&body, |entry| queue.hide(entry))),
            _ => Err("UnsupportedOperation"),
        }
    }

    fn create(&self, name: &str) -> Response {
        let url = format!("http://stub/queue/{name}");
        let is_fifo = name.ends_with(".fifo");
        let queue = Queue { is_fifo, messages: Mutex::default(), changed: Notify::new() };
        lock(&self.0).insert(url.clone(), Arc::new(queue));
        Ok(json!({"QueueUrl": url}))
    }

    fn find(&self, body: &Value) -> Option<Arc<Queue>> {
        lock(&self.0).get(body["QueueUrl"].as_str()?).cloned()
    }
}

impl Queue {
    fn attributes(&self) -> Value {
        let messages = lock(&self.messages);
        json!({"Attributes": {
            "FifoQueue": self.is_fifo.to_string(),
            "MaximumMessageSize": "1048576",
            "ApproximateNumberOfMessages": messages.visible.len().to_string(),
            "ApproximateNumberOfMessagesNotVisible": messages.hidden.len().to_string(),
            "ApproximateNumberOfMessagesDelayed": "0",
        }})
    }

    fn send(&self, message: &Value) -> Value {
        let mut messages = lock(&self.messages);
        messages.last += 1;
        let number = messages.last;
        messages
            .visible
            .insert(number, message["MessageBody"].as_str().unwrap_or_default().to_owned());
        self.changed.notify_waiters();
        json!({"MessageId": number.to_string(), "MD5OfMessageBody": ""})
    }

    /// Receives by long poll. As with SQS, a poll whose client has disconnected may still receive
    /// messages.
    async fn receive(&self, request: &Value) -> Value {
        let seconds = |name: &str, otherwise| {
            Duration::from_secs(request[name].as_u64().unwrap_or(otherwise))
        };
        let limit = request["MaxNumberOfMessages"]
            .as_u64()
            .map_or(1, |limit| limit as usize)
            .min(MAX_RECEIVED);
        let (until, visibility) =
            (Instant::now() + seconds("WaitTimeSeconds", 0), seconds("VisibilityTimeout", 30));
        loop {
            // Registered before the look, so that no change between the look and the wait is
            // missed.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let (found, returns) = lock(&self.messages).take(self.is_fifo, limit, visibility);
            let now = Instant::now();
            if !found.is_empty() || now >= until {
                return json!({"Messages": found});
            }
            let _ = timeout_at(returns.map_or(until, |returns| returns.min(until)), changed).await;
        }
    }

    fn delete(&self, entry: &Value) -> Value {
        if let Some(number) = number(entry) {
            lock(&self.messages).hidden.remove(&number);
            // The next messages of the group are free now.
            self.changed.notify_waiters();
        }
        json!({})
    }

    fn hide(&self, entry: &Value) -> Value {
        let until = Instant::now()
            + Duration::from_secs(entry["VisibilityTimeout"].as_u64().unwrap_or_default());
        if let Some(hidden) = number(entry) {
            lock(&self.messages).hidden.entry(hidden).and_modify(|hidden| hidden.0 = until);
            self.changed.notify_waiters();
        }
        json!({})
    }
}

impl Messages {
    /// Takes the next messages and hides them. Also returns the time at which the first hidden
    /// message becomes visible again.
    fn take(
        &mut self,
        is_fifo: bool,
        limit: usize,
        visibility: Duration,
    ) -> (Vec<Value>, Option<Instant>) {
        let now = Instant::now();
        let expired: Vec<u64> = self
            .hidden
            .iter()
            .filter(|(_, hidden)| hidden.0 <= now)
            .map(|(number, _)| *number)
            .collect();
        for number in expired {
            if let Some((_, body)) = self.hidden.remove(&number) {
                self.visible.insert(number, body);
            }
        }
        let mut found = Vec::new();
        // All messages of a FIFO queue are of one group: no message is returned while others are
        // hidden.
        while found.len() < limit && !(is_fifo && found.is_empty() && !self.hidden.is_empty()) {
            let Some((number, body)) = self.visible.pop_first() else { break };
            found.push(json!({
                "MessageId": number.to_string(),
                "ReceiptHandle": number.to_string(),
                "MD5OfBody": "",
                "Body": body,
            }));
            self.hidden.insert(number, (now + visibility, body));
        }
        (found, self.hidden.values().map(|hidden| hidden.0).min())
    }
}

/// Handles each entry of a batch. All entries succeed.
fn batch(body: &Value, each: impl Fn(&Value) -> Value) -> Value {
    let entries = body["Entries"].as_array().map(Vec::as_slice).unwrap_or_default();
    let done = entries.iter().map(|entry| {
        let mut answer = each(entry);
        answer["Id"] = entry["Id"].clone();
        answer
    });
    json!({"Successful": done.collect::<Vec<_>>(), "Failed": []})
}

/// The message number, which is also the receipt.
fn number(entry: &Value) -> Option<u64> {
    entry["ReceiptHandle"].as_str()?.parse().ok()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
