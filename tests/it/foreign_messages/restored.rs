//! Messages from before a restore, and the rotation of the key.

use std::sync::Arc;
use std::time::{Duration, Instant};

use projectionist::sqlx;
use serde_json::Value;

use super::{PAYLOADS, both_queues, payloads, signed, wire_event};
use crate::support::{Folder, TIMEOUT, World, eventually};

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
