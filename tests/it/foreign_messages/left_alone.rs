//! Messages of other applications: they are left alone and reported, and block no event.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_sqs::types::{MessageSystemAttributeName, QueueAttributeName};
use projectionist::Queue;
use serde_json::{Value, json};

use super::{EVENTS, both_queues, other_events, payloads, signed, unsigned};
use crate::queue::without_relay;
use crate::support::{Folder, Tally, World, eventually, registry};

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
        played.clone().prints(&["1 message not of this log"]);
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
