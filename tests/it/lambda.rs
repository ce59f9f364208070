//! Lambda: the shipped binary as a function, invoked by the runtime's interface with what is really in the queue.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use projectionist::Queue;
use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use serde_json::{Value, json};

use crate::support::{
    Fate, Folder, Function, PATIENCE, Proxy, Running, Runtime, Tally, World, eventually, execute, holds, schedule,
    setting,
};

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

/// Sessions with a transaction open that they do not end: those of the function, for the test has none.
async fn waiting_handlers(world: &World) -> u64 {
    let name = &world.database_name;
    world
        .number(&format!(
            "select count(*) from information_schema.processlist where db = '{name}' and info like 'update gate%'"
        ))
        .await
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

async fn is_fanned_out_and_deleted(world: World) {
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.booted(&[&a.file(&[]), &b.file(&[])]).await;
    let mut function = world.function(&["--projectors", folder.path()]).await;
    for round in 1..=3 {
        world.append_and_publish(120).await;
        assert_eq!(function.drain(&world).await, 12);
        for tally in [&a, &b] {
            world.assert_complete(tally).await;
        }
        assert_eq!((world.position("a").await, world.queue.depth().await.expect("a depth")), (120 * round, 0));
    }
    function.process.terminate().await.exits(0);
}

#[tokio::test]
async fn a_batch_of_a_fifo_queue_is_passed_to_every_projector_and_deleted() {
    is_fanned_out_and_deleted(World::new().await).await;
}

#[tokio::test]
async fn a_batch_of_a_standard_queue_is_passed_to_every_projector_and_deleted() {
    is_fanned_out_and_deleted(World::with_standard_queue().await).await;
}

/// In a FIFO queue, and so in this order: what was passed is deleted, what was not and all after it is returned.
#[tokio::test]
async fn an_invocation_that_runs_out_of_time_answers_before_its_end_and_the_next_goes_on() {
    let world = World::new().await;
    let (quick, slow, last) = (Tally::new("quick"), Tally::new("slow"), Tally::new("the_last"));
    let folder = world.booted(&[&quick.file(&[]), &slow.file(&[GATE]), &last.file(&[])]).await;
    let mut gate = close_gate(&world, 25).await;
    world.append_and_publish(50).await;
    let options = ["--projectors", folder.path(), "--batch=10", "--convoy-seconds=60", "--deadline-margin=1500"];
    let mut function = world.function(&options).await;

    let batch = world.capture().await;
    assert_eq!(batch.messages.len(), 5);
    function.begin(&batch.event(&world), Duration::from_secs(8));
    eventually("the slow one waits", async || waiting_handlers(&world).await == 1).await;
    let answer = function.answer().await.expect("an answer");
    assert_eq!(waiting_handlers(&world).await, 0, "nobody is frozen in the middle of a transaction");
    assert_eq!(
        (world.position("quick").await, world.position("slow").await, world.position("the_last").await),
        (50, 20, 0)
    );
    // Nobody has passed them, for the last one had no turn yet.
    assert_eq!(batch.settle(&world, &answer).await, [0, 1, 2, 3, 4]);

    // It is known now who is slow: it holds up nobody.
    let batch = world.capture().await;
    function.begin(&batch.event(&world), Duration::from_secs(8));
    eventually("the last one has its turn", async || world.position("the_last").await == 50).await;
    let answer = function.answer().await.expect("an answer");
    assert_eq!(batch.settle(&world, &answer).await, Vec::<usize>::new());
    assert_eq!(
        (waiting_handlers(&world).await, world.position("slow").await, world.queue.depth().await.expect("a depth")),
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
async fn of_a_batch_that_runs_out_of_time_what_everybody_has_passed_is_not_returned() {
    for (world, is_fifo) in [(World::new().await, true), (World::with_standard_queue().await, false)] {
        let (first, slow) = (Tally::new("first"), Tally::new("slow"));
        let folder = world.booted(&[&first.file(&[]), &slow.file(&[GATE])]).await;
        let mut gate = close_gate(&world, 25).await;
        world.append_and_publish(50).await;
        let options = ["--projectors", folder.path(), "--batch=10", "--convoy-seconds=60", "--deadline-margin=1500"];
        let mut function = world.function(&options).await;
        let batch = world.capture().await;
        let event = batch.event(&world);
        let answer = function.invoke(&event, Duration::from_secs(8)).await.expect("an answer");
        // Those that end with 10 and 20, wherever they are in the batch; of a FIFO queue they are the first.
        let last = |record: &Value| {
            let body: Value = serde_json::from_str(record["body"].as_str().expect("a body")).expect("JSON");
            body["events"].as_array().and_then(|events| events.last()?["position"].as_u64()).expect("a position")
        };
        let positions: Vec<u64> = event["Records"].as_array().expect("records").iter().map(last).collect();
        let returned = batch.settle(&world, &answer).await;
        let returned_positions: Vec<u64> = returned.iter().map(|&index| positions[index]).collect();
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
async fn a_database_that_goes_away_in_the_middle_of_a_batch_makes_it_come_again_and_loses_nothing() {
    let world = World::new().await;
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.booted(&[&a.file(&[]), &b.file(&[])]).await;
    let (is_down, commits) = (Arc::new(AtomicBool::new(false)), AtomicU64::new(0));
    let down = Arc::clone(&is_down);
    let url = world
        .database_url_by(move |bytes| {
            // The third commit is the last that the server hears of, until it is there again.
            if holds(bytes, "COMMIT") && commits.fetch_add(1, Ordering::SeqCst) == 2 {
                down.store(true, Ordering::SeqCst);
                return Fate::CutAfter;
            }
            if down.load(Ordering::SeqCst) { Fate::Reset } else { Fate::Passes }
        })
        .await;
    world.append_and_publish(50).await;
    let options = ["--projectors", folder.path(), "--batch=10", "--connect-timeout=2", "--database-url", &url];
    let mut function = world.function(&options).await;
    let batch = world.capture().await;
    let answer = function.invoke(&batch.event(&world), Duration::from_secs(8)).await.expect("an answer");
    assert!(is_down.load(Ordering::SeqCst), "it went away");
    assert_eq!((world.position("a").await, world.position("b").await), (30, 0));
    assert_eq!(batch.settle(&world, &answer).await, [0, 1, 2, 3, 4], "all after what nobody can vouch for");

    is_down.store(false, Ordering::SeqCst);
    assert_eq!(function.drain(&world).await, 5);
    world.assert_complete(&a).await;
    world.assert_complete(&b).await;
}

#[tokio::test]
async fn a_projector_that_breaks_makes_no_message_fail_and_the_others_go_on() {
    let world = World::new().await;
    let (a, poisoned, b) = (Tally::new("a"), Tally::new("poisoned"), Tally::new("b"));
    let poison = "insert into poisoned (position) values (nullif(:position, 33))";
    let poisoned_file = poisoned.file(&[]).replace("insert into poisoned (position) values (:position)", poison);
    let folder = world.booted(&[&a.file(&[]), &poisoned_file, &b.file(&[])]).await;
    let mut function = world.function(&["--projectors", folder.path()]).await;
    world.append_and_publish(60).await;
    assert_eq!(function.drain(&world).await, 6);
    world.append_and_publish(20).await;
    // Foreign and malformed messages stop nothing, either.
    for body in ["hello", "{\"log\":\"another\",\"prev\":0,\"events\":[]}"] {
        let send = world.sqs.send_message().queue_url(&world.queue_url).message_body(body).message_group_id("events");
        send.message_deduplication_id(uuid::Uuid::now_v7().to_string()).send().await.expect("sent");
    }
    world.append_and_publish(20).await;
    assert_eq!(function.drain(&world).await, 6);
    world.assert_complete(&a).await;
    world.assert_complete(&b).await;
    world.assert_folded(&poisoned).await;
    assert_eq!((world.status("poisoned").await, world.position("poisoned").await), ("broken".into(), 32));
    let left = function.process.terminate().await.exits(0);
    assert!(left.log().iter().any(|line| line["alert"] == "projector_broken"), "{}", left.stderr);
}

#[tokio::test]
async fn a_handler_that_never_ends_is_found_out_in_one_invocation_and_breaks_only_its_projector() {
    let world = World::new().await;
    let (endless, b) = (Tally::new("an_endless_one"), Tally::new("b"));
    let folder = world.booted(&[&endless.file(&[GATE]), &b.file(&[])]).await;
    let _gate = close_gate(&world, 15).await;
    world.append_and_publish(30).await;
    let options = ["--projectors", folder.path(), "--handler-timeout=2", "--convoy-seconds=1"];
    let mut function = world.function(&options).await;
    assert_eq!(function.drain(&world).await, 3);
    assert_eq!((world.status("an_endless_one").await, world.position("an_endless_one").await), ("broken".into(), 14));
    world.assert_folded(&endless).await;
    world.assert_complete(&b).await;
}

#[tokio::test]
async fn after_an_invocation_that_was_killed_each_event_is_applied_once() {
    let world = World::new().await;
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.booted(&[&a.file(&[]), &b.file(&[GATE])]).await;
    let mut gate = close_gate(&world, 25).await;
    world.append_and_publish(50).await;
    let options = ["--projectors", folder.path(), "--batch=10", "--convoy-seconds=60"];
    let function = world.function(&options).await;
    let batch = world.capture().await;
    function.begin(&batch.event(&world), PATIENCE);
    eventually("it is in the middle of the batch", async || waiting_handlers(&world).await == 1).await;
    assert!(function.process.strike_down().await, "it was running");
    assert_eq!((world.position("a").await, world.position("b").await), (50, 20));
    batch.abandon(&world).await;

    execute(&mut gate, "rollback").await;
    let mut another = world.function(&options).await;
    assert_eq!(another.drain(&world).await, 5);
    world.assert_complete(&a).await;
    world.assert_complete(&b).await;
}

/// The process stands still meanwhile, as a function does between two invocations.
#[tokio::test]
async fn a_function_whose_connections_were_ended_while_it_was_frozen_passes_the_next_batch() {
    let world = World::new().await;
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.booted(&[&a.file(&[]), &b.file(&[])]).await;
    // A user of its own, so that its sessions can be told from the test's.
    let user = format!("u{:x}", fastrand::u64(..));
    let mut admin = world.connection().await;
    execute(&mut admin, &format!("create user '{user}'@'%' identified by 'x'")).await;
    execute(&mut admin, &format!("grant all on {}.* to '{user}'@'%'", world.database_name)).await;
    let url = world.database_url.replace("://root@", &format!("://{user}:x@"));
    let mut function = world.function(&["--projectors", folder.path(), "--database-url", &url]).await;
    for round in 1..=3 {
        world.append_and_publish(30).await;
        assert_eq!(function.drain(&world).await, 3);
        function.is_waiting_for(round * 2).await;
        function.process.signal("STOP").await;
        assert!(end_sessions(&mut admin, &user).await > 0, "connections are kept between invocations");
        world.append_and_publish(30).await;
        let batch = world.capture().await;
        function.begin(&batch.event(&world), PATIENCE);
        function.process.signal("CONT").await;
        let answer = function.answer().await.expect("an answer");
        assert_eq!(batch.settle(&world, &answer).await, Vec::<usize>::new());
        world.assert_complete(&a).await;
        world.assert_complete(&b).await;
    }
    execute(&mut admin, &format!("drop user '{user}'@'%'")).await;
}

/// Ends every session of a user, and says how many there were.
async fn end_sessions(admin: &mut MySqlConnection, user: &str) -> usize {
    let sessions =
        sqlx::query_scalar::<_, u64>("select cast(id as unsigned) from information_schema.processlist where user = ?");
    let sessions = sessions.bind(user).fetch_all(&mut *admin).await.expect("the sessions");
    for session in &sessions {
        // One that has gone by itself meanwhile cannot be ended.
        let _ = sqlx::raw_sql(AssertSqlSafe(format!("kill {session}"))).execute(&mut *admin).await;
    }
    sessions.len()
}

/// As behind a network that forgets connections on which nothing is sent.
#[tokio::test]
async fn a_function_whose_connections_went_silent_while_it_was_not_used_passes_the_next_batch() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.booted(&[&a.file(&[])]).await;
    let (proxy, url) = world.database_proxy(|_| Fate::Passes).await;
    let options = ["--projectors", folder.path(), "--idle-timeout=0", "--database-url", &url];
    let mut function = world.function(&options).await;
    for round in 1..=3 {
        proxy.silence();
        world.append_and_publish(30).await;
        let batch = world.capture().await;
        let answer = function.invoke(&batch.event(&world), PATIENCE / 2).await.expect("an answer");
        assert_eq!(batch.settle(&world, &answer).await, Vec::<usize>::new());
        world.assert_complete(&a).await;
        function.is_waiting_for(round + 1).await;
    }
}

#[tokio::test]
async fn a_scheduled_invocation_publishes_and_catches_up_what_the_queue_does_not_feed() {
    let world = World::new().await;
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.booted(&[&a.file(&[]), &b.file(&[])]).await;
    let options = ["--projectors", folder.path(), "--reconcile-after=1", "--message-events=10"];
    let mut function = world.function(&options).await;

    world.append(30).await;
    let summary = function.invoke(&schedule(), PATIENCE).await.expect("an answer");
    // Nobody takes the messages, so it is the store that feeds them.
    assert_eq!(summary, json!({"events": 30, "published": 30, "high_water": 30, "behind": [], "broken": []}));
    assert_eq!((world.position("a").await, world.queue.depth().await.expect("a depth")), (30, 3));
    assert_eq!(function.drain(&world).await, 3);
    assert_eq!(world.number("select count(*) from event_log where relay_holder is not null").await, 0);

    world.append_and_publish(30).await;
    world.sqs.purge_queue().queue_url(&world.queue_url).send().await.expect("purged");
    eventually("the queue is empty", async || world.queue.depth().await.expect("a depth") == 0).await;
    let summary = function.invoke(&schedule(), PATIENCE).await.expect("an answer");
    assert_eq!(summary, json!({"events": 0, "published": 60, "high_water": 60, "behind": [], "broken": []}));
    world.assert_complete(&a).await;
    world.assert_complete(&b).await;
}

#[tokio::test]
async fn a_scheduled_invocation_that_publishes_for_longer_brings_what_comes_meanwhile() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.booted(&[&a.file(&[])]).await;
    let function = world.function(&["--projectors", folder.path(), "--relay-seconds=900"]).await;
    function.begin(&schedule(), PATIENCE * 10);
    for published in [10, 20, 30] {
        world.append(10).await;
        eventually("it is published", async || world.number("select published from event_log").await == published)
            .await;
    }
    let mut other = world.function(&["--projectors", folder.path()]).await;
    assert!(other.drain(&world).await > 0);
    world.assert_complete(&a).await;
    // Whoever ends it, its lease is given up.
    let left = function.process.terminate().await.exits(0);
    assert_eq!(
        world.number("select count(*) from event_log where relay_holder is not null").await,
        0,
        "{}",
        left.stderr
    );
}

#[tokio::test]
async fn a_scheduled_invocation_that_can_do_nothing_fails_in_time_and_the_next_makes_up_for_it() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.booted(&[&a.file(&[])]).await;
    let (is_queue_away, is_database_away) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let away = |is_away: &Arc<AtomicBool>| {
        let is_away = Arc::clone(is_away);
        move |_: &[u8]| if is_away.load(Ordering::SeqCst) { Fate::Reset } else { Fate::Passes }
    };
    let endpoint = setting("AWS_ENDPOINT_URL").expect("the parts are up");
    let queue = Proxy::new(endpoint.trim_start_matches("http://").trim_end_matches('/'), away(&is_queue_away)).await;
    let url = world.database_url_by(away(&is_database_away)).await;
    let options =
        ["lambda", "--projectors", folder.path(), "--connect-timeout=2", "--reconcile-after=0", "--database-url", &url];
    let mut command = world.command(&options);
    command.env("AWS_ENDPOINT_URL", format!("http://{}", queue.address()));
    let mut function = Function::start(command).await;
    world.append(20).await;

    let refused = |answer: Result<Value, Value>, word: &str| {
        let error = answer.expect_err("it can do nothing");
        assert!(error["errorMessage"].as_str().is_some_and(|message| message.contains(word)), "{error}");
    };
    refused(function.invoke(&schedule(), Duration::from_secs(8)).await, "queue");
    is_queue_away.store(false, Ordering::SeqCst);
    is_database_away.store(true, Ordering::SeqCst);
    refused(function.invoke(&schedule(), Duration::from_secs(8)).await, "database");
    is_database_away.store(false, Ordering::SeqCst);
    // Now it has the queue, and loses it again.
    function.invoke(&schedule(), PATIENCE).await.expect("an answer");
    world.append(20).await;
    is_queue_away.store(true, Ordering::SeqCst);
    refused(
        function.invoke(&schedule(), Duration::from_secs(8)).await,
        "nothing of what is in the log after position 20",
    );
    // It has caught up from the store meanwhile, and publishes as soon as it can.
    assert_eq!(world.position("a").await, 40);
    is_queue_away.store(false, Ordering::SeqCst);
    let summary = function.invoke(&schedule(), PATIENCE).await.expect("an answer");
    assert_eq!((&summary["published"], &summary["events"]), (&json!(40), &json!(20)));
    function.drain(&world).await;
    world.assert_complete(&a).await;
}

#[tokio::test]
async fn invocations_write_metrics_before_their_answer() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.booted(&[&a.file(&[])]).await;
    let mut function = world.function(&["--projectors", folder.path(), "--metrics=emf"]).await;
    let total = |left: &str, name: &str| -> Option<f64> {
        let lines = left.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let metrics = lines.filter(|line| line.get("_aws").is_some());
        metrics.filter_map(|line| line[name].as_f64()).reduce(|one, other| one + other)
    };
    world.append_and_publish(30).await;
    assert_eq!(function.drain(&world).await, 3);
    let totals = |names: [&str; 2]| {
        let written = function.process.logged();
        names.map(|name| total(&written, name))
    };
    // Written before the answer; read by the test a little later.
    eventually("what was applied", async || totals(["EventsApplied", "Heartbeat"]) == [Some(30.0), None]).await;
    function.invoke(&schedule(), PATIENCE).await.expect("an answer");
    let totals = || ["LagSeconds", "Heartbeat"].map(|name| total(&function.process.logged(), name));
    eventually("the lag, and a heartbeat", async || totals() == [Some(0.0), Some(1.0)]).await;
}

#[tokio::test]
async fn a_projector_that_is_far_behind_makes_no_message_fail_and_catches_up_in_invocations() {
    let world = World::new().await;
    let (behind, quick) = (Tally::new("behind"), Tally::new("quick"));
    let folder = world.booted(&[&behind.file(&[GATE]), &quick.file(&[])]).await;
    let mut gate = close_gate(&world, 305).await;
    // An old release plays the other alone meanwhile.
    let only_quick = Folder::new().with("1.toml", &quick.file(&[]));
    world.append(400).await;
    world.run(&["play", "--until-idle", "--projectors", only_quick.path()]).await.exits(0);
    assert_eq!((world.position("behind").await, world.position("quick").await), (0, 400));

    let options = [
        "--projectors",
        folder.path(),
        "--batch=100",
        "--convoy-events=50",
        "--convoy-seconds=2",
        "--reconcile-after=0",
    ];
    let mut function = world.function(&options).await;
    world.append_and_publish(10).await;
    let batch = world.capture().await;
    function.begin(&batch.event(&world), Duration::from_secs(12));
    let answer = function.answer().await.expect("an answer");
    assert_eq!(batch.settle(&world, &answer).await, Vec::<usize>::new());
    // It is cut off at the deadline, in the middle of a page, and keeps what it has committed.
    assert_eq!((world.position("quick").await, world.position("behind").await), (410, 300));
    assert_eq!(waiting_handlers(&world).await, 0);
    execute(&mut gate, "rollback").await;
    let summary = function.invoke(&schedule(), PATIENCE).await.expect("an answer");
    assert_eq!(summary["behind"], json!([]));
    world.assert_complete(&behind).await;
    world.assert_complete(&quick).await;
}

/// Fewer connections than stragglers.
#[tokio::test]
async fn many_projectors_that_are_far_behind_all_catch_up_on_few_connections() {
    let world = World::new().await;
    let tallies: Vec<Tally> = (0..6).map(|number| Tally::new(&format!("tally_{number}"))).collect();
    let files: Vec<String> = tallies.iter().map(|tally| tally.file(&[])).collect();
    let folder = world.booted(&files.iter().map(String::as_str).collect::<Vec<_>>()).await;
    world.append(6_000).await;
    let options =
        ["--projectors", folder.path(), "--batch=100", "--convoy-events=50", "--connections=4", "--reconcile-after=0"];
    let mut function = world.function(&options).await;
    let summary = function.invoke(&schedule(), PATIENCE).await.expect("an answer");
    assert_eq!(summary["behind"], json!([]));
    for tally in &tallies {
        world.assert_complete(tally).await;
    }
    let left = function.process.terminate().await.exits(0);
    assert!(!left.stderr.contains("timed out"), "nobody waits in vain for a connection: {}", left.stderr);
}

async fn plays_beside_a_function(world: World) {
    let (a, b) = (Tally::new("a"), Tally::new("b"));
    let folder = world.booted(&[&a.file(&[]), &b.file(&[])]).await;
    let worker = ["play", "--receive-wait=1", "--message-events=5", "--visibility=3", "--projectors", folder.path()];
    let worker = world.start(&worker);
    let mut function = world.function(&["--projectors", folder.path(), "--convoy-events=50"]).await;
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
                let answer = function.invoke(&batch.event(&world), PATIENCE).await.expect("an answer");
                batch.settle(&world, &answer).await;
            }
        }
        captured
    };
    let ((), captured) = tokio::join!(writing, tokio::time::timeout(PATIENCE * 2, mapping));
    assert!(captured.expect("both come to the end") > 0, "the function had its share");
    worker.terminate().await.exits(0);
    world.assert_complete(&a).await;
    world.assert_complete(&b).await;
}

#[tokio::test]
async fn a_worker_and_a_function_at_once_on_one_fifo_queue_do_no_harm() {
    plays_beside_a_function(World::new().await).await;
}

#[tokio::test]
async fn a_worker_and_a_function_at_once_on_one_standard_queue_do_no_harm() {
    plays_beside_a_function(World::with_standard_queue().await).await;
}

#[tokio::test]
async fn what_is_no_event_of_ours_is_refused_with_what_was_expected_and_the_function_goes_on() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.booted(&[&a.file(&[])]).await;
    let mut command = world.command(&["lambda", "--projectors", folder.path()]);
    command.env_remove("QUEUE_URL");
    let mut function = Function::start(command).await;
    for (event, word) in [
        (json!("{\"Records\":"), "EOF"),
        (json!({"Records": [{"eventSource": "aws:s3", "s3": {}}]}), "aws:s3"),
        (json!({"key": "value"}), "neither Records nor a detail-type"),
        (schedule(), "QUEUE_URL"),
    ] {
        let error = function.invoke(&event, PATIENCE).await.expect_err("it is refused");
        assert_eq!(error["errorType"], "Projectionist.Input");
        let message = error["errorMessage"].as_str().expect("a message");
        assert!(message.contains(word), "{message}");
    }
    // A batch needs no queue's URL.
    world.append_and_publish(20).await;
    assert_eq!(function.drain(&world).await, 2);
    world.assert_complete(&a).await;
}

#[tokio::test]
async fn a_function_that_cannot_be_initialized_says_why_to_lambda_and_exits_as_every_command() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &Tally::new("a").file(&[]));
    let with_projectors = ["lambda", "--projectors", folder.path()];
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent = format!("mysql://root@{}/x", silent.local_addr().expect("an address"));
    for (arguments, url, kind, code, words) in [
        (
            &["lambda"][..],
            Some(world.database_url.as_str()),
            "Projectionist.Input",
            2,
            &["no projectors", "PROJECTORS"][..],
        ),
        (&with_projectors, None, "Projectionist.Input", 2, &["no database is named", "DATABASE_URL"]),
        (&with_projectors, Some("mysql://root@127.0.0.1:1/x"), "Projectionist.OutOfReach", 3, &["127.0.0.1:1/x"]),
        (&with_projectors, Some(&silent), "Projectionist.OutOfReach", 3, &["did not answer"]),
    ] {
        let mut runtime = Runtime::new().await;
        let mut command = world.command(arguments);
        match url {
            Some(url) => command.env("DATABASE_URL", url),
            None => command.env_remove("DATABASE_URL"),
        };
        runtime.set_up(&mut command);
        let ended = Running::spawn(command).finish().await.exits(code).says(words);
        let error = runtime.init_error().await;
        assert_eq!((&error["errorType"], error["errorMessage"].as_str()), (&json!(kind), Some(ended.error().as_str())));
    }
    let elsewhere = world.run(&with_projectors).await.exits(2);
    elsewhere.says(&["AWS_LAMBDA_RUNTIME_API is not set", "use play elsewhere"]);
}

#[tokio::test]
async fn the_binary_without_arguments_is_a_function_where_lambda_starts_it() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.booted(&[&a.file(&[])]).await;
    let mut bootstrap = world.command(&[]);
    bootstrap.env("PROJECTORS", folder.path());
    let mut function = Function::start(bootstrap).await;
    world.append_and_publish(10).await;
    assert_eq!(function.drain(&world).await, 1);
    world.assert_complete(&a).await;
}

#[tokio::test]
async fn sigterm_ends_a_function_and_an_invocation_in_hand_answers_first() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.booted(&[&a.file(&[GATE])]).await;
    let idle = world.function(&["--projectors", folder.path()]).await;
    idle.process.terminate().await.exits(0);

    let _gate = close_gate(&world, 5).await;
    world.append_and_publish(10).await;
    let mut busy = world.function(&["--projectors", folder.path(), "--convoy-seconds=60"]).await;
    let batch = world.capture().await;
    busy.begin(&batch.event(&world), PATIENCE * 10);
    eventually("it is in the middle of the batch", async || waiting_handlers(&world).await == 1).await;
    busy.process.signal("TERM").await;
    let answer = busy.answer().await.expect("an answer");
    assert_eq!(batch.settle(&world, &answer).await, [0]);
    assert_eq!((waiting_handlers(&world).await, world.position("a").await), (0, 0));
    busy.process.finish().await.exits(0);
}

/// Not a test: prints how long a function takes from its start to its first question, and to its first answer, that is with
/// its first projection committed. `PROJECTIONIST_BINARY` names another binary than that of the tests.
#[tokio::test]
#[ignore = "measures, and asserts nothing"]
async fn cold_start() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.booted(&[&a.file(&[])]).await;
    let (mut to_init, mut to_commit) = (Vec::new(), Vec::new());
    for _ in 0..15 {
        world.append_and_publish(10).await;
        let batch = world.capture().await;
        let command = world.command(&["lambda", "--projectors", folder.path()]);
        let command = match std::env::var("PROJECTIONIST_BINARY") {
            Ok(binary) => {
                let mut other = tokio::process::Command::new(binary);
                other.args(command.as_std().get_args()).stdout(Stdio::piped()).stderr(Stdio::piped());
                command.as_std().get_envs().for_each(|(name, value)| _ = value.map(|value| other.env(name, value)));
                other
            }
            Err(_) => command,
        };
        let began = Instant::now();
        let mut function = Function::start(command).await;
        to_init.push(began.elapsed());
        let answer = function.invoke(&batch.event(&world), PATIENCE).await.expect("an answer");
        to_commit.push(began.elapsed());
        assert_eq!(batch.settle(&world, &answer).await, Vec::<usize>::new());
    }
    world.assert_complete(&a).await;
    for (what, mut times) in [("init done", to_init), ("first batch of ten events committed", to_commit)] {
        times.sort();
        eprintln!("{what}: median {:?}, from {:?} to {:?}", times[times.len() / 2], times[0], times[times.len() - 1]);
    }
}
