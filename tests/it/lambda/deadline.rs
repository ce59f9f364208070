//! Invocations that do not end normally: a timeout, a database outage, an endless handler, a kill,
//! a freeze, SIGTERM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use projectionist::Queue;
use serde_json::Value;

use super::{GATE, close_gate, waiting_handlers};
use crate::support::{
    ProxyAction, TIMEOUT, Tally, World, eventually, execute, is_commit, kill, sessions,
};

/// A FIFO queue keeps the order: the first message that some projector has not passed is returned,
/// and so are all later messages.
#[tokio::test]
async fn an_invocation_that_runs_out_of_time_responds_and_the_next_continues() {
    let world = World::new().await;
    let (quick, slow, last) = (Tally::new("quick"), Tally::new("slow"), Tally::new("the_last"));
    let folder = world.boot_files(&[&quick.file(&[]), &slow.file(&[GATE]), &last.file(&[])]).await;
    let mut gate = close_gate(&world, 25).await;
    world.append_and_publish(50).await;
    let options = [
        "--projectors",
        folder.path(),
        "--batch=10",
        "--background-after-seconds=60",
        "--deadline-margin=1500",
    ];
    let mut function = world.function(&options).await;

    let batch = world.capture().await;
    assert_eq!(batch.messages.len(), 5);
    function.begin(&batch.event(&world), Duration::from_secs(8));
    eventually("the slow projector waits", async || world.lock_waits().await == 1).await;
    let answer = function.answer().await.expect("an answer");
    assert_eq!(waiting_handlers(&world).await, 0, "no transaction stays open after the response");
    assert_eq!(
        (
            world.position("quick").await,
            world.position("slow").await,
            world.position("the_last").await
        ),
        (50, 20, 0)
    );
    // The last projector had no turn, so no message was passed by all projectors.
    assert_eq!(batch.settle(&world, &answer).await, [0, 1, 2, 3, 4]);

    // The slow projector is known now: it no longer delays the others.
    let batch = world.capture().await;
    function.begin(&batch.event(&world), Duration::from_secs(8));
    eventually("the last projector has its turn", async || world.position("the_last").await == 50)
        .await;
    let answer = function.answer().await.expect("an answer");
    assert_eq!(batch.settle(&world, &answer).await, Vec::<usize>::new());
    assert_eq!(
        (
            waiting_handlers(&world).await,
            world.position("slow").await,
            world.queue.depth().await.expect("a depth")
        ),
        (0, 20, 0)
    );

    execute(&mut gate, "rollback").await;
    world.append_and_publish(10).await;
    assert_eq!(function.drain(&world).await, 1);
    for tally in [&quick, &slow, &last] {
        world.assert_complete(tally).await;
    }
}

#[tokio::test]
async fn a_timed_out_batch_returns_only_messages_not_applied_by_all() {
    for (world, is_fifo) in
        [(World::new().await, true), (World::with_standard_queue().await, false)]
    {
        let (first, slow) = (Tally::new("first"), Tally::new("slow"));
        let folder = world.boot_files(&[&first.file(&[]), &slow.file(&[GATE])]).await;
        let mut gate = close_gate(&world, 25).await;
        world.append_and_publish(50).await;
        let options = [
            "--projectors",
            folder.path(),
            "--batch=10",
            "--background-after-seconds=60",
            "--deadline-margin=1500",
        ];
        let mut function = world.function(&options).await;
        let batch = world.capture().await;
        let event = batch.event(&world);
        let answer = function.invoke(&event, Duration::from_secs(8)).await.expect("an answer");
        // The position of the last event in a message.
        let last = |record: &Value| {
            let body: Value =
                serde_json::from_str(record["body"].as_str().expect("a body")).expect("JSON");
            body["events"]
                .as_array()
                .and_then(|events| events.last()?["position"].as_u64())
                .expect("a position")
        };
        let positions: Vec<u64> =
            event["Records"].as_array().expect("records").iter().map(last).collect();
        let returned = batch.settle(&world, &answer).await;
        let returned_positions: Vec<u64> = returned.iter().map(|&index| positions[index]).collect();
        // Both projectors passed the messages that end at 10 and 20. In a FIFO queue these come
        // first.
        let mut not_passed = positions.clone();
        not_passed.retain(|&position| position > 20);
        assert_eq!(returned_positions, not_passed);
        assert!(!is_fifo || positions == [10, 20, 30, 40, 50], "{positions:?}");

        execute(&mut gate, "rollback").await;
        assert_eq!(function.drain(&world).await, not_passed.len());
        world.append_and_publish(5).await;
        function.drain(&world).await;
        for tally in [&first, &slow] {
            world.assert_complete(tally).await;
        }
    }
}

#[tokio::test]
async fn a_database_outage_in_a_batch_causes_redelivery_and_no_loss() {
    let world = World::new().await;
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.boot_files(&[&a.file(&[]), &b.file(&[])]).await;
    let (is_down, committed) = (Arc::new(AtomicBool::new(false)), AtomicU64::new(0));
    let down = Arc::clone(&is_down);
    let url = world
        .database_url_through_proxy(move |bytes| {
            // The third commit is the last that reaches the server, until the test restores the
            // proxy.
            if is_commit(bytes) && committed.fetch_add(1, Ordering::SeqCst) == 2 {
                down.store(true, Ordering::SeqCst);
                return ProxyAction::CutAfter;
            }
            if down.load(Ordering::SeqCst) { ProxyAction::Reset } else { ProxyAction::Forward }
        })
        .await;
    world.append_and_publish(50).await;
    let options = [
        "--projectors",
        folder.path(),
        "--batch=10",
        "--connect-timeout=2",
        "--database-url",
        &url,
    ];
    let mut function = world.function(&options).await;
    let batch = world.capture().await;
    let answer =
        function.invoke(&batch.event(&world), Duration::from_secs(8)).await.expect("an answer");
    assert!(is_down.load(Ordering::SeqCst), "the proxy cut the connection");
    assert_eq!((world.position("a").await, world.position("b").await), (30, 0));
    assert_eq!(
        batch.settle(&world, &answer).await,
        [0, 1, 2, 3, 4],
        "no message was passed by both projectors"
    );

    is_down.store(false, Ordering::SeqCst);
    assert_eq!(function.drain(&world).await, 5);
    world.assert_complete(&a).await;
    world.assert_complete(&b).await;
}

#[tokio::test]
async fn an_endless_handler_in_an_invocation_breaks_only_its_projector() {
    let world = World::new().await;
    let (endless, b) = (Tally::new("an_endless_one"), Tally::new("b"));
    let folder = world.boot_files(&[&endless.file(&[GATE]), &b.file(&[])]).await;
    let _gate = close_gate(&world, 15).await;
    world.append_and_publish(30).await;
    let options =
        ["--projectors", folder.path(), "--handler-timeout=2", "--background-after-seconds=1"];
    let mut function = world.function(&options).await;
    assert_eq!(function.drain(&world).await, 3);
    assert_eq!(
        (world.status("an_endless_one").await, world.position("an_endless_one").await),
        ("broken".into(), 14)
    );
    world.assert_folded(&endless).await;
    world.assert_complete(&b).await;
}

#[tokio::test]
async fn after_a_killed_invocation_each_event_is_applied_once() {
    let world = World::new().await;
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.boot_files(&[&a.file(&[]), &b.file(&[GATE])]).await;
    let mut gate = close_gate(&world, 25).await;
    world.append_and_publish(50).await;
    let options = ["--projectors", folder.path(), "--batch=10", "--background-after-seconds=60"];
    let function = world.function(&options).await;
    let batch = world.capture().await;
    function.begin(&batch.event(&world), TIMEOUT);
    eventually("the function is in the middle of the batch", async || {
        world.lock_waits().await == 1
    })
    .await;
    assert!(function.process.kill().await, "the function was running");
    assert_eq!((world.position("a").await, world.position("b").await), (50, 20));
    batch.abandon(&world).await;

    execute(&mut gate, "rollback").await;
    let mut another = world.function(&options).await;
    assert_eq!(another.drain(&world).await, 5);
    world.assert_complete(&a).await;
    world.assert_complete(&b).await;
}

/// The process is stopped meanwhile, as Lambda freezes a function between two invocations.
#[tokio::test]
async fn a_function_whose_connections_closed_while_frozen_applies_the_next_batch() {
    let world = World::new().await;
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.boot_files(&[&a.file(&[]), &b.file(&[])]).await;
    // A separate user, so that its sessions can be distinguished from those of the test.
    let user = format!("u{:x}", fastrand::u64(..));
    let mut admin = world.connection().await;
    execute(&mut admin, &format!("create user '{user}'@'%' identified by 'x'")).await;
    execute(&mut admin, &format!("grant all on {}.* to '{user}'@'%'", world.database_name)).await;
    let url = world.database_url.replace("://root@", &format!("://{user}:x@"));
    let mut function =
        world.function(&["--projectors", folder.path(), "--database-url", &url]).await;
    for round in 1..=3 {
        world.append_and_publish(30).await;
        assert_eq!(function.drain(&world).await, 3);
        function.wait_for_invocations(round * 2).await;
        function.process.signal("STOP").await;
        let own_sessions =
            sessions(&mut admin).await.into_iter().filter(|session| session.user == user);
        assert!(
            kill(&mut admin, own_sessions).await > 0,
            "connections stay open between invocations"
        );
        world.append_and_publish(30).await;
        let batch = world.capture().await;
        function.begin(&batch.event(&world), TIMEOUT);
        function.process.signal("CONT").await;
        let answer = function.answer().await.expect("an answer");
        assert_eq!(batch.settle(&world, &answer).await, Vec::<usize>::new());
        world.assert_complete(&a).await;
        world.assert_complete(&b).await;
    }
    execute(&mut admin, &format!("drop user '{user}'@'%'")).await;
}

/// As with a network that silently drops idle connections.
#[tokio::test]
async fn a_function_whose_connections_went_silent_while_idle_applies_the_next_batch() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.boot_files(&[&a.file(&[])]).await;
    let (proxy, url) = world.database_proxy(|_| ProxyAction::Forward).await;
    let options = ["--projectors", folder.path(), "--idle-timeout=0", "--database-url", &url];
    let mut function = world.function(&options).await;
    for round in 1..=3 {
        proxy.silence();
        world.append_and_publish(30).await;
        let batch = world.capture().await;
        let answer = function.invoke(&batch.event(&world), TIMEOUT / 2).await.expect("an answer");
        assert_eq!(batch.settle(&world, &answer).await, Vec::<usize>::new());
        world.assert_complete(&a).await;
        function.wait_for_invocations(round + 1).await;
    }
}

#[tokio::test]
async fn sigterm_ends_a_function_after_the_current_invocation_responds() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.boot_files(&[&a.file(&[GATE])]).await;
    let idle = world.function(&["--projectors", folder.path()]).await;
    idle.process.terminate().await.exits(0);

    let _gate = close_gate(&world, 5).await;
    world.append_and_publish(10).await;
    let mut busy =
        world.function(&["--projectors", folder.path(), "--background-after-seconds=60"]).await;
    let batch = world.capture().await;
    busy.begin(&batch.event(&world), TIMEOUT * 10);
    eventually("the function is in the middle of the batch", async || {
        world.lock_waits().await == 1
    })
    .await;
    busy.process.signal("TERM").await;
    let answer = busy.answer().await.expect("an answer");
    assert_eq!(batch.settle(&world, &answer).await, [0]);
    assert_eq!((waiting_handlers(&world).await, world.position("a").await), (0, 0));
    busy.process.finish().await.exits(0);
}
