//! Lambda: the shipped binary as a function. The runtime API invokes it with real messages of the
//! queue.

mod deadline;
mod scheduled;
mod start;

use projectionist::Queue;
use projectionist::sqlx::MySqlConnection;

use crate::support::{Folder, Session, TIMEOUT, Tally, World, execute};

/// A statement that waits while another transaction locks the gate at the event's position.
const GATE: &str = "update gate set n = n + 1 where at = :position";

/// Creates the gate, and locks its row at a position in the transaction that this returns.
async fn close_gate(world: &World, at: u64) -> MySqlConnection {
    world.execute("create table gate (at bigint unsigned primary key, n int not null)").await;
    world.execute(&format!("insert into gate values ({at}, 0)")).await;
    let mut lock_holder = world.connection().await;
    execute(&mut lock_holder, "start transaction").await;
    execute(&mut lock_holder, &format!("select n from gate where at = {at} for update")).await;
    lock_holder
}

/// The number of sessions that execute the gate's statement. Some of them may not wait for its
/// lock: `lock_waits` counts those that wait.
async fn waiting_handlers(world: &World) -> usize {
    let waits = |session: &&Session| session.statement.starts_with("update gate");
    world.sessions().await.iter().filter(waits).count()
}

impl World {
    /// Appends `events` events, and publishes them in messages of ten.
    async fn append_and_publish(&self, events: usize) {
        self.append(events).await;
        self.run(&["relay", "--once", "--message-events=10"]).await.exits(0);
    }

    /// Writes projector files into a new folder, and boots them. Returns the folder.
    async fn boot_files(&self, files: &[&str]) -> Folder {
        let folder = Folder::new();
        for (index, file) in files.iter().enumerate() {
            folder.write(&format!("{index}.toml"), file);
        }
        self.run(&["boot", "--projectors", folder.path()]).await.exits(0);
        folder
    }
}

async fn assert_fanned_out_and_deleted(world: World) {
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.boot_files(&[&a.file(&[]), &b.file(&[])]).await;
    let mut function = world.function(&["--projectors", folder.path()]).await;
    for round in 1..=3 {
        world.append_and_publish(120).await;
        assert_eq!(function.drain(&world).await, 12);
        for tally in [&a, &b] {
            world.assert_complete(tally).await;
        }
        assert_eq!(
            (world.position("a").await, world.queue.depth().await.expect("a depth")),
            (120 * round, 0)
        );
    }
    function.process.terminate().await.exits(0);
}

#[tokio::test]
async fn a_fifo_batch_is_applied_by_every_projector_and_deleted() {
    assert_fanned_out_and_deleted(World::new().await).await;
}

#[tokio::test]
async fn a_standard_batch_is_applied_by_every_projector_and_deleted() {
    assert_fanned_out_and_deleted(World::with_standard_queue().await).await;
}

#[tokio::test]
async fn a_broken_projector_fails_no_message_and_the_others_continue() {
    let world = World::new().await;
    let (a, poisoned, b) = (Tally::new("a"), Tally::new("poisoned"), Tally::new("b"));
    let poison = "insert into poisoned (position) values (nullif(:position, 33))";
    let poisoned_file =
        poisoned.file(&[]).replace("insert into poisoned (position) values (:position)", poison);
    let folder = world.boot_files(&[&a.file(&[]), &poisoned_file, &b.file(&[])]).await;
    let mut function = world.function(&["--projectors", folder.path()]).await;
    world.append_and_publish(60).await;
    assert_eq!(function.drain(&world).await, 6);
    world.append_and_publish(20).await;
    // Foreign and malformed messages stop no projector. They are returned, and in a FIFO queue so
    // are all later messages. The later messages of this log are applied nevertheless.
    for body in ["hello", "{\"log\":\"another\",\"prev\":0,\"events\":[]}"] {
        let send = world
            .sqs
            .send_message()
            .queue_url(&world.queue_url)
            .message_body(body)
            .message_group_id("events");
        send.message_deduplication_id(uuid::Uuid::now_v7().to_string()).send().await.expect("sent");
    }
    world.append_and_publish(20).await;
    let batch = world.capture().await;
    let answer = function.invoke(&batch.event(&world), TIMEOUT).await.expect("an answer");
    assert_eq!(batch.settle(&world, &answer).await, [2, 3, 4, 5], "{answer}");
    world.assert_complete(&a).await;
    world.assert_complete(&b).await;
    world.assert_folded(&poisoned).await;
    assert_eq!(
        (world.status("poisoned").await, world.position("poisoned").await),
        ("broken".into(), 32)
    );
    let finished = function.process.terminate().await.exits(0);
    assert!(
        finished.log().iter().any(|line| line["alert"] == "projector_broken"),
        "{}",
        finished.stderr
    );
}

async fn assert_worker_and_function_share(world: World) {
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.boot_files(&[&a.file(&[]), &b.file(&[])]).await;
    let worker = [
        "play",
        "--receive-wait=1",
        "--message-events=5",
        "--visibility-timeout=3",
        "--projectors",
        folder.path(),
    ];
    let worker = world.start(&worker);
    let mut function =
        world.function(&["--projectors", folder.path(), "--background-after-events=50"]).await;
    let writing = async {
        for _ in 0..60 {
            world.append(20).await;
        }
    };
    let mapping = async {
        let mut captured = 0;
        while world.position("a").await < 1_200 || world.position("b").await < 1_200 {
            let batch = world.capture().await;
            if !batch.messages.is_empty() {
                captured += batch.messages.len();
                let answer =
                    function.invoke(&batch.event(&world), TIMEOUT).await.expect("an answer");
                batch.settle(&world, &answer).await;
            }
        }
        captured
    };
    let ((), captured) = tokio::join!(writing, tokio::time::timeout(TIMEOUT * 2, mapping));
    assert!(
        captured.expect("both projectors reach the end of the log") > 0,
        "the function received messages"
    );
    worker.terminate().await.exits(0);
    world.assert_complete(&a).await;
    world.assert_complete(&b).await;
}

#[tokio::test]
async fn a_worker_and_a_function_can_share_a_fifo_queue() {
    assert_worker_and_function_share(World::new().await).await;
}

#[tokio::test]
async fn a_worker_and_a_function_can_share_a_standard_queue() {
    assert_worker_and_function_share(World::with_standard_queue().await).await;
}
