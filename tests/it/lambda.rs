//! Lambda: the shipped binary as a function, invoked by the runtime's interface with what is really
//! in the queue.

mod deadline;
mod scheduled;
mod start;

use projectionist::Queue;
use projectionist::sqlx::MySqlConnection;

use crate::support::{Folder, Session, TIMEOUT, Tally, World, execute};

/// A statement that waits where somebody holds the gate at the event's position.
const GATE: &str = "update gate set n = n + 1 where at = :position";

/// Makes the gate, and holds it at a position until what this returns is ended.
async fn close_gate(world: &World, at: u64) -> MySqlConnection {
    world.execute("create table gate (at bigint unsigned primary key, n int not null)").await;
    world.execute(&format!("insert into gate values ({at}, 0)")).await;
    let mut keeper = world.connection().await;
    execute(&mut keeper, "start transaction").await;
    execute(&mut keeper, &format!("select n from gate where at = {at} for update")).await;
    keeper
}

/// Sessions that are in the statement of the gate. (Whether they wait there, says `lock_waits`:
/// others are just passing it.)
async fn waiting_handlers(world: &World) -> usize {
    let waits = |session: &&Session| session.statement.starts_with("update gate");
    world.sessions().await.iter().filter(waits).count()
}

impl World {
    /// Appends so many events, and publishes them in messages of ten.
    async fn append_and_publish(&self, events: usize) {
        self.append(events).await;
        self.run(&["relay", "--once", "--message-events=10"]).await.exits(0);
    }

    /// Puts projector files of these into a folder, and boots them.
    async fn booted(&self, files: &[&str]) -> Folder {
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
    let folder = world.booted(&[&a.file(&[]), &b.file(&[])]).await;
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
    let folder = world.booted(&[&a.file(&[]), &poisoned_file, &b.file(&[])]).await;
    let mut function = world.function(&["--projectors", folder.path()]).await;
    world.append_and_publish(60).await;
    assert_eq!(function.drain(&world).await, 6);
    world.append_and_publish(20).await;
    // Foreign and malformed messages stop nothing, either. They are returned, and on a FIFO queue
    // all after them; what is ours among these is applied all the same.
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
    let left = function.process.terminate().await.exits(0);
    assert!(left.log().iter().any(|line| line["alert"] == "projector_broken"), "{}", left.stderr);
}

async fn assert_worker_and_function_share(world: World) {
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.booted(&[&a.file(&[]), &b.file(&[])]).await;
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
    assert!(captured.expect("both come to the end") > 0, "the function had its share");
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
