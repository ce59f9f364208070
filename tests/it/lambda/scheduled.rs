//! The scheduled invocation: it makes up for missing messages, purges, and projectors far behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use projectionist::Queue;
use serde_json::{Value, json};

use super::{GATE, close_gate, waiting_handlers};
use crate::support::{
    Folder, Function, Proxy, ProxyAction, TIMEOUT, Tally, World, eventually, execute, schedule,
    setting,
};

#[tokio::test]
async fn a_scheduled_invocation_publishes_and_catches_up_projectors_without_messages() {
    let world = World::new().await;
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.boot_files(&[&a.file(&[]), &b.file(&[])]).await;
    let options = ["--projectors", folder.path(), "--reconcile-after=1", "--message-events=10"];
    let mut function = world.function(&options).await;

    world.append(30).await;
    let summary = function.invoke(&schedule(), TIMEOUT).await.expect("an answer");
    // No function takes the messages, so the events come from the store.
    assert_eq!(
        summary,
        json!({
            "events": 30, "published": 30, "high_water": 30, "lagging": [], "outdated": [],
            "broken": [], "retrying": [], "foreign_messages": 0
        })
    );
    assert_eq!((world.position("a").await, world.queue.depth().await.expect("a depth")), (30, 3));
    assert_eq!(function.drain(&world).await, 3);
    assert_eq!(
        world.number("select count(*) from event_log where relay_lease_holder is not null").await,
        0
    );

    world.append_and_publish(30).await;
    world.sqs.purge_queue().queue_url(&world.queue_url).send().await.expect("purged");
    eventually("the queue is empty", async || world.queue.depth().await.expect("a depth") == 0)
        .await;
    let summary = function.invoke(&schedule(), TIMEOUT).await.expect("an answer");
    assert_eq!(
        summary,
        json!({
            "events": 0, "published": 60, "high_water": 60, "lagging": [], "outdated": [],
            "broken": [], "retrying": [], "foreign_messages": 0
        })
    );
    world.assert_complete(&a).await;
    world.assert_complete(&b).await;
}

#[tokio::test]
async fn a_long_publishing_invocation_includes_events_appended_meanwhile() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.boot_files(&[&a.file(&[])]).await;
    let function = world.function(&["--projectors", folder.path(), "--relay-seconds=900"]).await;
    function.begin(&schedule(), TIMEOUT * 10);
    for published in [10, 20, 30] {
        world.append(10).await;
        eventually("the events are published", async || {
            world.number("select published from event_log").await == published
        })
        .await;
    }
    let mut other = world.function(&["--projectors", folder.path()]).await;
    assert!(other.drain(&world).await > 0);
    world.assert_complete(&a).await;
    // A terminated function releases its lease.
    let finished = function.process.terminate().await.exits(0);
    assert_eq!(
        world.number("select count(*) from event_log where relay_lease_holder is not null").await,
        0,
        "{}",
        finished.stderr
    );
}

#[tokio::test]
async fn a_scheduled_invocation_without_its_servers_fails_in_time_and_the_next_catches_up() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.boot_files(&[&a.file(&[])]).await;
    let (is_queue_away, is_database_away) =
        (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let away = |is_away: &Arc<AtomicBool>| {
        let is_away = Arc::clone(is_away);
        move |_: &[u8]| {
            if is_away.load(Ordering::SeqCst) { ProxyAction::Reset } else { ProxyAction::Forward }
        }
    };
    let endpoint = setting("AWS_ENDPOINT_URL").expect("AWS_ENDPOINT_URL is set");
    let queue = Proxy::new(
        endpoint.trim_start_matches("http://").trim_end_matches('/'),
        away(&is_queue_away),
    )
    .await;
    let url = world.database_url_through_proxy(away(&is_database_away)).await;
    let options = [
        "lambda",
        "--projectors",
        folder.path(),
        "--connect-timeout=2",
        "--reconcile-after=0",
        "--database-url",
        &url,
    ];
    let mut command = world.command(&options);
    command.env("AWS_ENDPOINT_URL", format!("http://{}", queue.address()));
    let mut function = Function::start(command).await;
    world.append(20).await;

    let refused = |answer: Result<Value, Value>, word: &str| {
        let error = answer.expect_err("the invocation fails");
        assert!(
            error["errorMessage"].as_str().is_some_and(|message| message.contains(word)),
            "{error}"
        );
    };
    refused(function.invoke(&schedule(), Duration::from_secs(8)).await, "queue");
    is_queue_away.store(false, Ordering::SeqCst);
    is_database_away.store(true, Ordering::SeqCst);
    refused(function.invoke(&schedule(), Duration::from_secs(8)).await, "database");
    is_database_away.store(false, Ordering::SeqCst);
    // The function reaches the queue now, and then loses it again.
    function.invoke(&schedule(), TIMEOUT).await.expect("an answer");
    world.append(20).await;
    is_queue_away.store(true, Ordering::SeqCst);
    refused(
        function.invoke(&schedule(), Duration::from_secs(8)).await,
        "no event after position 20",
    );
    // The function has caught up from the store, and publishes once the queue is back.
    assert_eq!(world.position("a").await, 40);
    is_queue_away.store(false, Ordering::SeqCst);
    let summary = function.invoke(&schedule(), TIMEOUT).await.expect("an answer");
    assert_eq!((&summary["published"], &summary["events"]), (&json!(40), &json!(20)));
    function.drain(&world).await;
    world.assert_complete(&a).await;
}

#[tokio::test]
async fn invocations_write_metrics_before_they_respond() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.boot_files(&[&a.file(&[])]).await;
    let mut function = world.function(&["--projectors", folder.path(), "--metrics=emf"]).await;
    let total = |log: &str, name: &str| -> Option<f64> {
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let metrics = lines.filter(|line| line.get("_aws").is_some());
        metrics.filter_map(|line| line[name].as_f64()).reduce(|one, other| one + other)
    };
    world.append_and_publish(30).await;
    assert_eq!(function.drain(&world).await, 3);
    let totals = |names: [&str; 2]| {
        let written = function.process.logged();
        names.map(|name| total(&written, name))
    };
    // Metrics are written before the response. The test reads them a little later.
    eventually("the applied events are in the metrics", async || {
        totals(["EventsApplied", "Heartbeat"]) == [Some(30.0), None]
    })
    .await;
    function.invoke(&schedule(), TIMEOUT).await.expect("an answer");
    let totals = || ["LagSeconds", "Heartbeat"].map(|name| total(&function.process.logged(), name));
    eventually("the lag and a heartbeat are in the metrics", async || {
        totals() == [Some(0.0), Some(1.0)]
    })
    .await;
}

#[tokio::test]
async fn a_projector_far_behind_fails_no_message_and_catches_up_over_invocations() {
    let world = World::new().await;
    let (behind, quick) = (Tally::new("behind"), Tally::new("quick"));
    let folder = world.boot_files(&[&behind.file(&[GATE]), &quick.file(&[])]).await;
    let mut gate = close_gate(&world, 305).await;
    // Meanwhile, an old release plays only the other projector.
    let only_quick = Folder::new().with("1.toml", &quick.file(&[]));
    world.append(400).await;
    world.run(&["play", "--until-idle", "--projectors", only_quick.path()]).await.exits(0);
    assert_eq!((world.position("behind").await, world.position("quick").await), (0, 400));

    let options = [
        "--projectors",
        folder.path(),
        "--batch=100",
        "--background-after-events=50",
        "--background-after-seconds=2",
        "--reconcile-after=0",
    ];
    let mut function = world.function(&options).await;
    world.append_and_publish(10).await;
    let batch = world.capture().await;
    function.begin(&batch.event(&world), Duration::from_secs(12));
    let answer = function.answer().await.expect("an answer");
    assert_eq!(batch.settle(&world, &answer).await, Vec::<usize>::new());
    // The deadline interrupts it in the middle of a page. Its committed batches remain.
    assert_eq!((world.position("quick").await, world.position("behind").await), (410, 300));
    assert_eq!(waiting_handlers(&world).await, 0);
    execute(&mut gate, "rollback").await;
    let summary = function.invoke(&schedule(), TIMEOUT).await.expect("an answer");
    assert_eq!(summary["lagging"], json!([]));
    world.assert_complete(&behind).await;
    world.assert_complete(&quick).await;
}

/// There are fewer connections than projectors far behind.
#[tokio::test]
async fn many_projectors_far_behind_all_catch_up_on_few_connections() {
    let world = World::new().await;
    let tallies: Vec<Tally> = (0..6).map(|number| Tally::new(&format!("tally_{number}"))).collect();
    let files: Vec<String> = tallies.iter().map(|tally| tally.file(&[])).collect();
    let folder = world.boot_files(&files.iter().map(String::as_str).collect::<Vec<_>>()).await;
    world.append(3_000).await;
    let options = [
        "--projectors",
        folder.path(),
        "--batch=100",
        "--background-after-events=50",
        "--connections=4",
        "--reconcile-after=0",
    ];
    let mut function = world.function(&options).await;
    let summary = function.invoke(&schedule(), TIMEOUT).await.expect("an answer");
    assert_eq!(summary["lagging"], json!([]));
    for tally in &tallies {
        world.assert_complete(tally).await;
    }
    let finished = function.process.terminate().await.exits(0);
    assert!(
        !finished.stderr.contains("timed out"),
        "no projector times out waiting for a connection: {}",
        finished.stderr
    );
}
