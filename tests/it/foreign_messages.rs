//! Messages that do not belong to the log: messages of other applications, forged messages, and
//! messages from before a restore. They are never applied, never deleted, and always reported. The
//! log's own messages are still applied.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_sqs::types::{MessageSystemAttributeName, QueueAttributeName};
use projectionist::{Queue, Registry, sqlx};
use ring::hmac;
use serde_json::{Value, json};

use crate::queue::{Payloads, without_relay};
use crate::support::{
    Faults, FaultyQueue, Folder, TIMEOUT, Tally, World, eventually, registry, schedule,
};

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

#[tokio::test]
async fn foreign_messages_are_neither_applied_nor_deleted_and_block_no_event() {
    for world in both_queues().await {
        let registry = payloads();
        world.append(5).await;
        world.boot(&registry).await;
        let (log, key) = world.identity().await;
        let foreign = [
            "hello".into(),
            "{\"Type\":\"Notification\",\"Message\":\"{}\"}".into(),
            "[1,2,3]".into(),
            "{}".into(),
            unsigned("another-log", 5, &other_events(6..=9)),
            unsigned(&log, 5, &other_events(6..=9)),
            unsigned(&log, 0, &other_events(1..=9)),
            unsigned(&log, 5, &[]),
            format!("{{\"log\":\"{log}\",\"prev\":5,\"last\":18446744073709551615}}"),
            signed(b"another key", &log, 4, &other_events(5..=5), 5),
            // Signed with the log's key, but not equal to the log. A clone of the database can send
            // such messages.
            signed(&key, "another-log", 4, &other_events(5..=5), 5),
            signed(&key, &log, 4, &other_events(5..=5), 5),
            signed(&key, &log, 5, &other_events(6..=9), 9),
            signed(&key, &log, 900, &other_events(901..=902), 902),
            signed(&key, &log, 18_446_744_073_709_551_615, &other_events(1..=1), 1),
            signed(&key, &log, 3, &other_events(5..=5), 5),
            signed(&key, &log, 5, &[], 5),
        ];
        for body in &foreign {
            world.send_to("foreign", body).await;
        }
        let count = foreign.len() as u64;

        let played = world.play_until_idle(&registry).await;
        assert_eq!((played.messages, played.broken), (0, 0));
        assert!((1..=count).contains(&played.foreign), "{played:?}");
        world.assert_payloads_are_those_of_the_log().await;
        assert_eq!(world.depth().await, count, "no message was deleted");

        world.append(20).await;
        world.play_until_idle(&registry).await;
        world.assert_payloads_are_those_of_the_log().await;
        let mut left = world.take_all().await;
        for body in foreign {
            let at = left.iter().position(|left| *left == body);
            left.swap_remove(at.unwrap_or_else(|| panic!("{body} is gone")));
        }
        assert!(
            left.iter().all(|left| left.starts_with("{\"sig\"")),
            "only messages of the relay may be left: {left:?}"
        );
        let seen = world.number("select foreign_messages from event_log").await;
        assert!(seen >= played.foreign, "{seen}");
    }
}

#[tokio::test]
async fn a_queue_with_only_foreign_messages_is_left_alone_with_an_alert() {
    for world in both_queues().await {
        let tally = Tally::new("tally");
        let projectors = Folder::new().with("tally.toml", &tally.file(&[]));
        world.append(3).await;
        world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
        let theirs: Vec<String> = (0..20).map(|n| format!("{{\"order\":{n}}}")).collect();
        for (n, body) in theirs.iter().enumerate() {
            world.send_to(&format!("group-{n}"), body).await;
        }
        let play = ["play", "--no-relay", "--receive-wait=1", "--projectors", projectors.path()];
        let worker = world.start(&play);
        worker.wait_for_log("\"alert\":\"foreign_messages\"").await;
        // Meanwhile, the events come from the store.
        world.append(10).await;
        world.run(&["relay", "--once"]).await.exits(0);
        eventually("the new events are played", async || world.position("tally").await == 13).await;
        let log = worker.terminate().await.exits(0).log();

        let alerts: Vec<&Value> =
            log.iter().filter(|line| line["alert"] == "foreign_messages").collect();
        assert_eq!(alerts.len(), 1, "one alert, not one for each receive");
        let alert = alerts[0];
        assert_eq!(
            (&alert["level"], alert["reasons"].as_str()),
            (&json!("ERROR"), Some("10 not readable")),
            "{alert}"
        );
        let name = world.queue_url.rsplit('/').next().expect("the URL ends with a name");
        assert!(
            alert["queue"]
                .as_str()
                .is_some_and(|queue| queue.starts_with("arn:") && queue.ends_with(name)),
            "{alert}"
        );
        assert_eq!(
            alert["example"].as_str().map(str::len),
            Some(36),
            "the example is a message id: {alert}"
        );

        let status = world.run(&["status", "--json"]).await.exits(0).json();
        assert!(status["foreign_messages"].as_u64().is_some_and(|seen| seen >= 10), "{status}");
        assert!(status["foreign_at"].is_string(), "{status}");
        let status = world.run(&["status"]).await.exits(0).stdout;
        assert!(status.contains("messages that are not of this log were received"), "{status}");
        let doctor = world.run(&["doctor", "--json"]).await.exits(0).json();
        let check = doctor["checks"]
            .as_array()
            .expect("the report has checks")
            .iter()
            .find(|c| c["name"] == "foreign messages");
        let check = check.expect("doctor has this check");
        assert!(check["level"] == "warning" && check["remedy"].is_string(), "{check}");

        let mut left = world.take_all().await;
        left.retain(|body| !body.starts_with("{\"sig\""));
        left.sort();
        let mut expected = theirs.clone();
        expected.sort();
        assert_eq!(left, expected);
    }
}

#[tokio::test]
async fn log_messages_get_through_beside_foreign_ones() {
    for world in both_queues().await {
        let tally = Tally::new("tally");
        let registry = registry(&[&tally]);
        world.boot(&registry).await;
        // On a FIFO queue, each message is in its own group.
        for n in 0..15 {
            world.send_to(&format!("group-{n}"), "theirs").await;
        }
        world.append(60).await;
        world.publish(2).await;
        // The projector gets its events only from the queue.
        let settings = without_relay().with_receive_wait(Duration::from_secs(1));
        let queue = Arc::new(world.queue_hiding(Duration::from_secs(2)).await);
        let playing = world.start_play_from(queue, &registry, settings);
        eventually("all events are played", async || world.position("tally").await == 60).await;
        let played = playing.stop().await;
        assert!(played.messages > 25 && played.foreign > 0, "{played:?}");
        world.assert_complete(&tally).await;
        eventually("only the foreign messages are left", async || world.depth().await == 15).await;
    }
}

#[tokio::test]
async fn a_foreign_message_that_blocks_the_message_group_blocks_no_projector() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.send_to(EVENTS, "theirs").await;
    world.append(10).await;
    world.publish(10).await;
    // The worker receives the foreign message together with one of the log, and hides it for 30 s.
    let playing = world.start_play_from(
        Arc::clone(&world.queue) as Arc<dyn Queue>,
        &registry,
        World::continuous_play_settings(),
    );
    eventually("the first ten events are played", async || world.position("tally").await == 10)
        .await;
    world.append(10).await;
    let began = Instant::now();
    eventually("the others are read from the store", async || world.position("tally").await == 20)
        .await;
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "the events must not wait for the visibility timeout"
    );
    let played = playing.stop().await;
    assert_eq!(played.foreign, 1);
    world.assert_complete(&tally).await;

    // At its end, the worker made the foreign message visible again.
    let received = world.queue.receive(Duration::from_secs(1)).await.expect("the queue answers");
    assert_eq!(received.first().map(|message| message.body.as_str()), Some("theirs"));
}

#[tokio::test]
async fn a_foreign_message_is_dead_lettered_by_the_queue_and_its_group_continues() {
    let world = World::new().await;
    let dead = World::new().await;
    let arn = dead.queue.identity().expect("the queue has an ARN");
    let policy = json!({"deadLetterTargetArn": arn, "maxReceiveCount": "2"}).to_string();
    let set = world.sqs.set_queue_attributes().queue_url(&world.queue_url);
    set.attributes(QueueAttributeName::RedrivePolicy, policy)
        .send()
        .await
        .expect("the attribute is set");
    let registry = payloads();
    world.boot(&registry).await;
    world.send_to(EVENTS, "theirs").await;
    world.append(10).await;
    world.publish(1).await;
    let queue = Arc::new(world.queue_hiding(Duration::from_secs(1)).await);
    let settings = without_relay().with_receive_wait(Duration::from_secs(1));
    let playing = world.start_play_from(queue, &registry, settings);
    eventually(
        "the log's messages are deleted, and the foreign message is in the dead-letter queue",
        async || {
            world.position("payloads").await == 10
                && world.depth().await == 0
                && dead.depth().await == 1
        },
    )
    .await;
    playing.stop().await;
    world.assert_payloads_are_those_of_the_log().await;
}

/// Messages that an attacker can make after seeing every published message. The attacker knows the
/// log's id, its positions and its event ids.
async fn forgeries(world: &World, genuine: &[String]) -> Vec<String> {
    let (log, _) = world.identity().await;
    let mut forged = Vec::new();
    for body in genuine {
        let message: Value = serde_json::from_str(body).expect("the text is JSON");
        let (prev, last) = (
            message["prev"].as_u64().expect("the message has `prev`"),
            message["last"].as_u64().expect("last"),
        );
        let signature = message["sig"].as_str().expect("a signature");
        let mut events = message["events"].as_array().expect("events").clone();
        for event in &mut events {
            event["payload"] = json!("forged");
        }
        // Shorter than the genuine message, so that sorting would put it first.
        let shorter = &events[..1];
        forged.extend([
            unsigned(&log, prev, &events),
            unsigned(&log, prev, shorter),
            with_signature(signature, &log, prev, &events, last),
            with_signature(signature, &log, prev, shorter, prev + 1),
            with_signature(&"0".repeat(64), &log, prev, shorter, prev + 1),
            signed(b"a guess", &log, prev, &events, last),
            signed(log.as_bytes(), &log, prev, shorter, prev + 1),
            // A complete genuine message with one change.
            body.replacen("\"payload\":{\"number\":", "\"payload\":{\"number\":9", 1),
            body.replacen("\"prev\":", "\"prev\": ", 1),
        ]);
    }
    assert!(forged.iter().all(|forged| !genuine.contains(forged)));
    forged
}

/// Appends a backlog and sends it with a forged message before each genuine one. If `floods`, all
/// forged messages are also sent first. Returns the number of forged messages.
async fn forge(world: &World, floods: bool) -> u64 {
    world.append(40).await;
    world.publish(4).await;
    let genuine = world.take_all().await;
    assert_eq!(genuine.len(), 10);
    let forged = forgeries(world, &genuine).await;
    let mut sent = 0;
    if floods {
        for body in &forged {
            world.send_to(EVENTS, body).await;
            sent += 1;
        }
    }
    for (body, forged) in genuine.iter().zip(forged.chunks(forged.len() / genuine.len())) {
        let one = &forged[sent as usize % forged.len()];
        world.send_to(EVENTS, one).await;
        world.send_to(EVENTS, body).await;
        sent += 1;
    }
    sent
}

#[tokio::test]
async fn forged_messages_are_never_applied_while_a_backlog_waits() {
    for floods in [false, true] {
        for world in both_queues().await {
            let registry = payloads();
            world.append(2).await;
            world.boot(&registry).await;
            let forged = forge(&world, floods).await;
            let queue = world.queue_hiding(Duration::from_secs(1)).await;
            // A standard queue has no order, so each receive is shuffled. A fixed order could hide
            // a defect.
            let faults =
                Faults { shuffled: !world.queue_url.ends_with(".fifo"), ..Faults::default() };
            let queue = Arc::new(FaultyQueue::new(&queue, faults, crate::support::seed()));
            let playing = world.start_play_from(
                Arc::clone(&queue) as Arc<dyn Queue>,
                &registry,
                World::continuous_play_settings(),
            );
            eventually("the backlog is played", async || world.position("payloads").await == 42)
                .await;
            let played = playing.stop().await;
            assert!(played.foreign > 0 && played.broken == 0, "{played:?}");
            world.assert_payloads_are_those_of_the_log().await;
            world.run(&["audit"]).await.exits(0);
            let depth = world.depth().await;
            assert!(depth >= forged, "a forged message was deleted: {depth} of {forged}");
        }
    }
}

#[tokio::test]
async fn forged_messages_are_never_applied_by_a_function_and_always_returned() {
    for world in both_queues().await {
        let is_fifo = world.queue_url.ends_with(".fifo");
        let projectors = Folder::new().with("payloads.toml", PAYLOADS);
        world.append(2).await;
        world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
        let forged = forge(&world, false).await;
        let mut function = world.function(&["--projectors", projectors.path()]).await;
        let mut returned = 0;
        let mut batches = Vec::new();
        for _ in 0..4 {
            let batch = world.capture().await;
            if batch.messages.is_empty() {
                break;
            }
            let answer = function
                .invoke(&batch.event(&world), TIMEOUT)
                .await
                .expect("the invocation succeeds");
            let failed = answer["batchItemFailures"].as_array().expect("failures").len();
            returned += failed;
            batches.push((batch.messages.len(), failed));
            // The genuine messages are applied even if they are returned.
            let _ = batch.settle(&world, &answer).await;
            if is_fifo {
                break;
            }
        }
        assert!(returned > 0, "{batches:?}");
        if is_fifo {
            assert_eq!(batches, [(10, 10)], "the first message is forged, so all are returned");
            // The five genuine messages of the batch.
            assert_eq!(world.position("payloads").await, 2 + 5 * 4);
        }
        let answer = function.invoke(&schedule(), TIMEOUT).await.expect("the invocation succeeds");
        assert!(answer["foreign_messages"].as_u64().is_some_and(|seen| seen > 0), "{answer}");
        let began = Instant::now();
        while world.position("payloads").await < 42 {
            assert!(began.elapsed() < TIMEOUT, "the function must read the rest from the store");
            function.invoke(&schedule(), TIMEOUT).await.expect("the invocation succeeds");
        }
        world.assert_payloads_are_those_of_the_log().await;
        world.run(&["audit"]).await.exits(0);
        let left = function.process.terminate().await.exits(0);
        let alerts: Vec<Value> =
            left.log().into_iter().filter(|line| line["alert"] == "foreign_messages").collect();
        assert_eq!(alerts.len(), 1, "{}", left.stderr);
        assert!(
            alerts[0]["queue"].as_str().is_some_and(|queue| queue.starts_with("arn:")),
            "{}",
            alerts[0]
        );
        let depth = world.depth().await;
        assert!(depth >= forged, "a forged message was deleted: {depth} of {forged}");
    }
}

impl World {
    /// Restores the database as from a backup: all events after this position are deleted, and
    /// everything that the projectors stored for them.
    async fn restore_to(&self, position: u64) {
        self.execute(&format!(
            "delete from events where position > {position}; delete from payloads \
             where position > {position}; \
             update projectors set position = {position}; \
             update event_log set published = {position}, high_water = {position}; \
             alter table events auto_increment = {}",
            position + 1
        ))
        .await;
        // The row count of that time.
        self.execute("update event_log set row_count = (select count(*) from events)").await;
    }

    async fn append_others(&self, count: usize) {
        let events: Vec<projectionist::NewEvent> = (0..count)
            .map(|number| projectionist::NewEvent {
                payload: format!("{{\"after the restore\":{number}}}"),
                ..crate::support::event(number)
            })
            .collect();
        self.store.append(&events).await.expect("the events are appended");
    }
}

/// A worker that has played up to 20 continues after a restore to 10. Then the messages of 11 to 20
/// are sent again.
async fn check_worker_after_restore(rotates: bool) {
    for world in both_queues().await {
        let registry = payloads();
        world.boot(&registry).await;
        world.append(10).await;
        world.publish(5).await;
        let queue = Arc::new(world.queue_hiding(Duration::from_secs(2)).await);
        let settings = World::continuous_play_settings().with_relay(None);
        let playing = world.start_play_from(queue, &registry, settings);
        eventually("ten events are played", async || world.position("payloads").await == 10).await;

        // Ten more events are published and played. Their messages are sent again after the
        // restore, as if no worker had received them.
        world.append(10).await;
        world.publish(5).await;
        eventually("the next ten events are played", async || {
            world.position("payloads").await == 20
        })
        .await;
        let (log, key) = world.identity().await;
        let events: Vec<(u64, String, String)> = sqlx::query_as(
            "select position, event_id, payload from events where position > 10 order by position",
        )
        .fetch_all(&mut world.connection().await)
        .await
        .expect("the log is readable");
        world.restore_to(10).await;
        let was: Vec<Value> = events
            .iter()
            .map(|(position, id, payload)| {
                wire_event(*position, id, serde_json::from_str(payload).expect("the text is JSON"))
            })
            .collect();
        if rotates {
            world.run(&["rotate", "--yes"]).await.exits(0);
        }
        world.append_others(10).await;
        world.publish(5).await;
        // The old messages arrive only now, together with the messages of the restored log.
        for chunk in was.chunks(3) {
            let (prev, last) = (
                chunk[0]["position"].as_u64().expect("the chunk has positions") - 1,
                chunk[chunk.len() - 1]["position"].as_u64(),
            );
            world
                .send_to(
                    "before",
                    &signed(&key, &log, prev, chunk, last.expect("the chunk has positions")),
                )
                .await;
        }
        eventually("the restored log is played", async || world.position("payloads").await == 20)
            .await;
        // The old messages are received repeatedly while more events are appended.
        world.append_others(5).await;
        world.publish(5).await;
        eventually("the worker continues", async || world.position("payloads").await == 25).await;
        let played = playing.stop().await;
        assert!(played.foreign > 0 && played.broken == 0, "{played:?}");
        world.assert_payloads_are_those_of_the_log().await;
    }
}

#[tokio::test]
async fn a_running_worker_after_restore_and_rotation_applies_only_the_new_log() {
    check_worker_after_restore(true).await;
}

#[tokio::test]
async fn after_a_restore_without_a_rotation_no_old_message_is_applied() {
    check_worker_after_restore(false).await;
}

/// A function that has applied up to 20 is invoked after a restore to 10, with messages from before
/// and after the restore.
async fn check_function_after_restore(rotates: bool) {
    for world in both_queues().await {
        let projectors = Folder::new().with("payloads.toml", PAYLOADS);
        world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
        let mut function = world.function(&["--projectors", projectors.path()]).await;
        world.append(10).await;
        world.publish(5).await;
        assert_eq!(function.drain(&world).await, 2);
        world.append(10).await;
        world.publish(3).await;
        let before = world.capture().await;
        let old: Vec<String> =
            before.messages.iter().map(|message| message.body().expect("a body").into()).collect();
        assert_eq!(old.len(), 4);
        let answer =
            function.invoke(&before.event(&world), TIMEOUT).await.expect("the invocation succeeds");
        assert_eq!(before.settle(&world, &answer).await, Vec::<usize>::new());
        assert_eq!(world.position("payloads").await, 20);

        world.restore_to(10).await;
        if rotates {
            world.run(&["rotate", "--yes"]).await.exits(0);
        }
        for body in &old {
            world.send_to("before", body).await;
        }
        // At first, the old messages are beyond the end of the log. Then the log has other events
        // at those positions, and their messages arrive together with the old ones.
        for (others, end) in [(0, 10), (10, 20), (5, 25)] {
            world.append_others(others).await;
            world.publish(5).await;
            let began = Instant::now();
            let mut returned = 0;
            while returned == 0 || world.position("payloads").await < end {
                assert!(
                    began.elapsed() < TIMEOUT,
                    "the function must apply the messages of the log"
                );
                let batch = world.capture().await;
                let answer = function
                    .invoke(&batch.event(&world), TIMEOUT)
                    .await
                    .expect("the invocation succeeds");
                let kept = batch.settle(&world, &answer).await;
                let is_old =
                    |at: &usize| old.iter().any(|old| batch.messages[*at].body() == Some(old));
                let came: Vec<usize> = (0..batch.messages.len()).filter(is_old).collect();
                assert!(came.iter().all(|at| kept.contains(at)), "{came:?} are not in {kept:?}");
                returned += came.len();
            }
            assert_eq!(world.position("payloads").await, end);
            world.assert_payloads_are_those_of_the_log().await;
        }
        function.process.terminate().await.exits(0);
        let mut left = world.take_all().await;
        left.retain(|body| old.contains(body));
        assert_eq!(left.len(), old.len(), "no old message was deleted");
    }
}

#[tokio::test]
async fn a_running_function_after_restore_and_rotation_applies_only_the_new_log() {
    check_function_after_restore(true).await;
}

#[tokio::test]
async fn a_running_function_after_restore_without_rotation_applies_only_the_new_log() {
    check_function_after_restore(false).await;
}

#[tokio::test]
async fn the_key_can_be_rotated_while_workers_and_functions_run() {
    for world in both_queues().await {
        let projectors = Folder::new().with("payloads.toml", PAYLOADS);
        world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
        let play = [
            "play",
            "--receive-wait=1",
            "--message-events=3",
            "--visibility-timeout=3",
            "--projectors",
            projectors.path(),
        ];
        let worker = world.start(&play);
        let mut function = world.function(&["--projectors", projectors.path()]).await;
        for round in 1..=3 {
            world.append(30).await;
            let batch = world.capture().await;
            if round > 1 && !batch.messages.is_empty() {
                let answer = function
                    .invoke(&batch.event(&world), TIMEOUT)
                    .await
                    .expect("the invocation succeeds");
                batch.settle(&world, &answer).await;
            } else {
                batch.abandon(&world).await;
            }
            let before = world.identity().await;
            world.run(&["rotate", "--yes"]).await.exits(0);
            let after = world.identity().await;
            assert!(before.0 != after.0 && before.1 != after.1 && after.1.len() == 32);
            world.append(30).await;
            eventually("all events are played", async || {
                world.position("payloads").await == round * 60
            })
            .await;
        }
        function.process.terminate().await.exits(0);
        let worker = worker.terminate().await.exits(0);
        world.assert_payloads_are_those_of_the_log().await;
        let key: String =
            world.identity().await.1.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!worker.stderr.contains(&key), "the key is in the log");
    }
}

#[tokio::test]
async fn a_rotation_asks_and_explains_the_effect_on_sent_messages() {
    let world = World::new().await;
    let before = world.identity().await;
    let asked = world.run(&["rotate"]).await.exits(2);
    assert!(asked.error().contains("--yes"), "{}", asked.error());
    assert_eq!(world.identity().await, before, "the key and the id are unchanged");
    let rotated = world.run(&["rotate", "--yes"]).await.exits(0);
    assert!(
        rotated.stdout.contains("purge the queue")
            && rotated.stdout.contains(&world.identity().await.0)
    );
}

/// The two queues that each `queue_changed` alert of a process names.
fn changes(log: &[Value]) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().expect("the value is text").to_owned();
    let changed = log.iter().filter(|line| line["alert"] == "queue_changed");
    changed.map(|line| (text(&line["queue"]), text(&line["published_to"]))).collect()
}

#[tokio::test]
async fn a_process_on_the_wrong_queue_warns_until_the_log_is_published_there() {
    let (world, other) = (World::new().await, World::new().await);
    let tally = Tally::new("tally");
    let projectors = Folder::new().with("tally.toml", &tally.file(&[]));
    world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
    let [here, there] =
        [&world, &other].map(|world| world.queue.identity().expect("the queue has an ARN"));
    let play = ["play", "--until-idle", "--projectors", projectors.path()];
    world.append(1).await;
    assert_eq!(changes(&world.run(&play).await.exits(0).log()), [], "nothing was published before");
    assert_eq!(changes(&world.run(&play).await.exits(0).log()), [], "the same queue");

    let there_too = [&play[..], &["--queue-url", &other.queue_url]].concat();
    let expected = vec![(there.clone(), here.clone())];
    let mut only_listens = there_too.clone();
    only_listens.push("--no-relay");
    assert_eq!(changes(&world.run(&only_listens).await.exits(0).log()), expected);
    assert_eq!(
        changes(
            &world.run(&["relay", "--once", "--queue-url", &other.queue_url]).await.exits(0).log()
        ),
        expected
    );
    let doctor =
        world.run(&["doctor", "--json", "--queue-url", &other.queue_url]).await.exits(0).json();
    let checks = doctor["checks"].as_array().expect("the report has checks").iter();
    let check = checks
        .clone()
        .find(|check| check["name"] == "published to")
        .expect("doctor has this check");
    assert_eq!(check["level"], "warning");
    assert!(
        check["detail"].as_str().is_some_and(|says| says.contains(&here))
            && check["remedy"].is_string(),
        "{check}"
    );

    // After this process has published, its queue is the log's queue.
    world.append(1).await;
    assert_eq!(changes(&world.run(&there_too).await.exits(0).log()), expected);
    assert_eq!(changes(&world.run(&there_too).await.exits(0).log()), []);
    assert_eq!(changes(&world.run(&["relay", "--once"]).await.exits(0).log()), [(here, there)]);
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn play_until_idle_ends_despite_foreign_messages_and_reports_them() {
    for world in both_queues().await {
        let tally = Tally::new("tally");
        let projectors = Folder::new().with("tally.toml", &tally.file(&[]));
        world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
        world.append(10).await;
        world.run(&["relay", "--once"]).await.exits(0);
        world.send_to(EVENTS, "theirs").await;
        world.append(10).await;
        let played =
            world.run(&["play", "--until-idle", "--projectors", projectors.path()]).await.exits(1);
        played.clone().prints(&["1 message(s)", "not of this log"]);
        world.assert_complete(&tally).await;
        let receive =
            world.sqs.receive_message().queue_url(&world.queue_url).max_number_of_messages(10);
        let receive = receive.message_system_attribute_names(MessageSystemAttributeName::All);
        let received = receive
            .wait_time_seconds(1)
            .send()
            .await
            .expect("the queue answers")
            .messages
            .unwrap_or_default();
        assert!(
            received.iter().any(|message| message.body() == Some("theirs")),
            "the foreign message is visible"
        );
    }
}
