//! Messages that do not belong to the log: messages of other applications, forged messages, and
//! messages from before a restore. They are never applied, never deleted, and always reported. The
//! log's own messages are still applied.

mod forged;
mod left_alone;
mod restored;
mod wrong_queue;

use std::time::Duration;

use projectionist::{Queue, Registry, sqlx};
use ring::hmac;
use serde_json::{Value, json};

use crate::queue::Payloads;
use crate::support::World;

/// The projector [`Payloads`] as a file, for the shipped binary.
const PAYLOADS: &str = "name = 'payloads'\nversion = 1\nmode = 'from_beginning'\n\
     setup = ['create table if not exists payloads (position bigint unsigned primary key, \
     payload mediumtext not null)']\n\
     [[on]]\nevents = ['*']\nsql = 'insert into payloads values (:position, :payload)'\n";

/// The message group of the relay's messages.
const EVENTS: &str = "events";

fn payloads() -> Registry {
    Registry::new().with(Payloads).expect("the name is unique")
}

impl World {
    /// Sends a message as another application would. On a FIFO queue, it is sent in this group.
    pub async fn send_to(&self, group: &str, body: &str) {
        let send = self.sqs.send_message().queue_url(&self.queue_url).message_body(body);
        let send = if self.queue_url.ends_with(".fifo") {
            send.message_group_id(group).message_deduplication_id(uuid::Uuid::now_v7().to_string())
        } else {
            send
        };
        send.send().await.expect("the message is sent");
    }

    async fn identity(&self) -> (String, Vec<u8>) {
        let identity = sqlx::query_as("select log_id, signing_key from event_log");
        identity.fetch_one(&mut self.connection().await).await.expect("the log has an id and a key")
    }

    /// Receives and deletes every message that is visible now. Returns their bodies.
    async fn take_all(&self) -> Vec<String> {
        let mut bodies = Vec::new();
        loop {
            let received =
                self.queue.receive(Duration::from_secs(1)).await.expect("the queue answers");
            if received.is_empty() {
                return bodies;
            }
            let receipts: Vec<String> =
                received.iter().map(|message| message.receipt.clone()).collect();
            bodies.extend(received.into_iter().map(|message| message.body));
            self.queue.delete(&receipts).await.expect("the messages are deleted");
        }
    }

    /// Asserts that `payloads` holds exactly the payloads of the log's events.
    async fn assert_payloads_are_those_of_the_log(&self) {
        let others = "select count(*) from payloads p left join events e using (position) \
                      where not (p.payload <=> e.payload)";
        let missing = "select count(*) from events e left join payloads p using (position) \
                       where p.position is null and e.event_type not like '$%'";
        assert_eq!(self.number(others).await, 0, "payloads that are not in the log");
        assert_eq!(self.number(missing).await, 0, "events that were not applied");
        assert_eq!(self.status("payloads").await, "live");
    }
}

/// An unsigned body, as a relay from before signatures wrote it.
fn unsigned(log: &str, prev: u64, events: &[Value]) -> String {
    format!("{{\"log\":\"{log}\",\"prev\":{prev},\"events\":{}}}", json!(events))
}

/// A body with the given signature.
fn with_signature(signature: &str, log: &str, prev: u64, events: &[Value], last: u64) -> String {
    let events = json!(events);
    format!(
        "{{\"sig\":\"{signature}\",\"log\":\"{log}\",\"prev\":{prev},\
         \"events\":{events},\"last\":{last}}}"
    )
}

/// A body that is signed with `key`.
fn signed(key: &[u8], log: &str, prev: u64, events: &[Value], last: u64) -> String {
    let unsigned = with_signature(&"0".repeat(64), log, prev, events, last);
    let tag = hmac::sign(
        &hmac::Key::new(hmac::HMAC_SHA256, key),
        &unsigned.as_bytes()["{\"sig\":\"\",".len() + 64..],
    );
    let digits: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    unsigned.replacen(&"0".repeat(64), &digits, 1)
}

fn wire_event(position: u64, event_id: &str, payload: Value) -> Value {
    json!({
        "position": position, "event_id": event_id, "stream_id": "forged",
        "stream_version": position, "event_type": "Opened",
        "recorded_at": "2026-01-01T00:00:00Z", "payload": payload,
    })
}

/// Events at these positions that are not in the log.
fn other_events(positions: std::ops::RangeInclusive<u64>) -> Vec<Value> {
    positions
        .map(|position| wire_event(position, &format!("other-{position}"), json!({})))
        .collect()
}

async fn both_queues() -> [World; 2] {
    [World::new().await, World::with_standard_queue().await]
}
