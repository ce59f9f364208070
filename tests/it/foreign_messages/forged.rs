//! Forged messages: a worker and a function never apply them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use projectionist::Queue;
use serde_json::{Value, json};

use super::{EVENTS, PAYLOADS, both_queues, payloads, signed, unsigned, with_signature};
use crate::support::{Faults, FaultyQueue, Folder, TIMEOUT, World, eventually, schedule};

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
