//! `play` and `relay`: until idle, as separate processes, and ended by SIGTERM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_sqs::types::QueueAttributeName as Attribute;
use projectionist::{Queue, Status};
use serde_json::json;
use tokio::net::TcpListener;

use super::{
    assert_failed_at, close_gate, failing_at, gated, tally, tally_positions, tally_with,
    wait_for_gated_handler, with_short_timeout,
};
use crate::support::{
    Folder, Proxy, ProxyAction, RunningProcess, SqsStub, World, contains_text, eventually, execute,
};

/// An idle process ends within this time after SIGTERM.
const QUICKLY: Duration = Duration::from_secs(3);

fn through(last: u64) -> Vec<u64> {
    (1..=last).collect()
}

#[tokio::test]
async fn play_until_idle_plays_everything_and_exits_with_0() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a")).with("2.toml", &tally("b"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.append(120).await;
    let played = world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(0);
    assert!(played.stdout.starts_with("idle: played "), "{}", played.stdout);
    for name in ["a", "b"] {
        assert_eq!(
            (world.position(name).await, tally_positions(&world, name).await),
            (120, through(120))
        );
    }
    assert_eq!(world.queue.depth().await.expect("the depth is readable"), 0);
}

#[tokio::test]
async fn play_until_idle_exits_with_1_if_a_projector_broke_and_the_others_are_done() {
    let world = World::new().await;
    let folder = Folder::new()
        .with("1.toml", &tally("a"))
        .with("2.toml", &failing_at("poisoned", 33))
        .with("3.toml", &tally("b"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.append(60).await;
    let play = ["play", "--until-idle", "--message-events=10", "--projectors", folder.path()];
    world.run(&play).await.exits(1).prints(&[
        "1 projector broke",
        "the others are at the high-water mark",
        "run boot",
    ]);
    for name in ["a", "b"] {
        assert_eq!(
            (world.status(name).await, tally_positions(&world, name).await),
            ("live".into(), through(60))
        );
    }
    assert_eq!(
        (world.status("poisoned").await, tally_positions(&world, "poisoned").await),
        ("broken".into(), through(32))
    );
    assert_failed_at(&world, "poisoned", 33).await;

    // The projector broke in an earlier run, so this run succeeds.
    world.append(5).await;
    world.run(&play).await.exits(0);
    assert_eq!(
        (tally_positions(&world, "a").await, tally_positions(&world, "poisoned").await),
        (through(65), through(32))
    );
}

#[tokio::test]
async fn an_unbooted_projector_is_not_played_and_a_log_line_says_so() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    world.append(5).await;
    let played = world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(0);
    let is_reported = |line: &serde_json::Value| {
        line["projector"] == "a@1"
            && line["message"].as_str().is_some_and(|message| message.contains("run boot"))
    };
    assert!(played.log().iter().any(is_reported), "{}", played.stderr);
    assert_eq!(world.status("a").await, "new");
}

#[tokio::test]
async fn relay_once_publishes_all_events_and_exits() {
    let world = World::new().await;
    world.append(25).await;
    let relay = ["relay", "--once", "--message-events=10"];
    assert_eq!(world.run(&relay).await.exits(0).stdout, "published 25 events, up to position 25\n");
    assert_eq!(world.run(&relay).await.exits(0).stdout, "published 0 events, up to position 25\n");
    assert_eq!(world.queue.depth().await.expect("the depth is readable"), 3);
}

#[tokio::test]
async fn two_concurrent_relays_publish_every_event_once() {
    let world = World::with_standard_queue().await;
    world.append(1_000).await;
    let relay = ["relay", "--once", "--message-events=10"];
    let (one, other) = tokio::join!(world.run(&relay), world.run(&relay));
    let events = |stdout: &str| {
        stdout
            .split(' ')
            .nth(1)
            .and_then(|count| count.replace(',', "").parse::<u64>().ok())
            .expect("the count is a number")
    };
    let (one, other) = (one.exits(0).stdout, other.exits(0).stdout);
    assert_eq!(events(&one) + events(&other), 1_000, "{one}{other}");
    // A standard queue does not drop repeated messages.
    assert_eq!(world.queue.depth().await.expect("the depth is readable"), 100);
}

#[tokio::test]
async fn play_beside_a_separate_relay_process_plays_everything() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.append(50).await;
    // Without a relay, nothing is published. Play reads the events from the store.
    let play = [
        "play",
        "--no-relay",
        "--until-idle",
        "--reconcile-after=1",
        "--projectors",
        folder.path(),
    ];
    assert_eq!(world.run(&play).await.exits(0).stdout, "idle: played 0 messages\n");
    assert_eq!(tally_positions(&world, "a").await, through(50));

    let relay = world.start(&["relay", "--message-events=10"]);
    world.append(50).await;
    eventually("all events are published", async || {
        world.number("select published from event_log").await == 100
    })
    .await;
    // The first fifty events arrive late, and are skipped.
    assert_eq!(world.run(&play).await.exits(0).stdout, "idle: played 10 messages\n");
    assert_eq!(tally_positions(&world, "a").await, through(100));
    relay.terminate().await.exits(0);
}

/// All connections to the queue are reset for a while.
#[tokio::test]
async fn projectors_read_the_store_during_a_queue_outage_that_is_logged_sparingly() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a")).with("2.toml", &tally("b"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let (is_away, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (away, receives) = (Arc::clone(&is_away), Arc::clone(&refused));
    let proxy = Proxy::for_queue(move |bytes| {
        if !away.load(Ordering::SeqCst) {
            return ProxyAction::Forward;
        }
        receives.fetch_add(
            u64::from(contains_text(bytes, "AmazonSQS.ReceiveMessage")),
            Ordering::SeqCst,
        );
        ProxyAction::Reset
    })
    .await;
    let mut play = world.command(&[
        "play",
        "--receive-wait=1",
        "--reconcile-after=1",
        "--projectors",
        folder.path(),
    ]);
    // One attempt, so that each call is one attempt of the SDK.
    play.env("AWS_ENDPOINT_URL", format!("http://{}", proxy.address()))
        .env("AWS_MAX_ATTEMPTS", "1");
    let play = RunningProcess::spawn(play);
    let are_at = async |position| {
        world.position("a").await == position && world.position("b").await == position
    };
    let count_lines =
        |log: &str, words: &str| log.lines().filter(|line| line.contains(words)).count();
    world.append(20).await;
    eventually("both projectors are played", async || are_at(20).await).await;

    is_away.store(true, Ordering::SeqCst);
    world.append(30).await;
    eventually("both projectors are played from the store", async || are_at(50).await).await;
    eventually("play receives repeatedly", async || refused.load(Ordering::SeqCst) >= 7).await;
    world.append(10).await;
    eventually("both projectors are still played", async || are_at(60).await).await;
    for words in
        ["cannot receive from the queue, trying again", "the relay cannot work now, trying again"]
    {
        let lines = count_lines(&play.logged(), words);
        assert!((1..=3).contains(&lines), "{lines} times: {words}\n{}", play.logged());
    }
    assert!(!play.has_logged("the queue answers again"), "{}", play.logged());
    assert_eq!(world.number("select published from event_log").await, 20);

    is_away.store(false, Ordering::SeqCst);
    play.wait_for_log("the queue answers again").await;
    world.append(20).await;
    eventually("both projectors are played", async || are_at(80).await).await;
    eventually("all events are published", async || {
        world.number("select published from event_log").await == 80
    })
    .await;
    eventually("all messages are deleted", async || {
        world.queue.depth().await.is_ok_and(|depth| depth == 0)
    })
    .await;
    let log = play.terminate().await.exits(0).stderr;
    assert_eq!(count_lines(&log, "the queue answers again"), 1);
    assert!(count_lines(&log, "cannot receive from the queue, trying again") <= 3, "{log}");
    assert_eq!(
        (tally_positions(&world, "a").await, tally_positions(&world, "b").await),
        (through(80), through(80))
    );
}

/// Uses a stub that returns the real messages, because LocalStack never fails for a part of a
/// batch.
#[tokio::test]
async fn messages_that_sqs_fails_to_delete_are_not_applied_again() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a")).with("2.toml", &tally("b"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.append(30).await;
    world.run(&["relay", "--once", "--message-events=10"]).await.exits(0);
    let sent = world.queue.receive(Duration::from_secs(1)).await.expect("the queue answers");
    let sent: Vec<String> = sent.into_iter().map(|message| message.body).collect();
    assert_eq!(sent.len(), 3);

    let stub = SqsStub::new().await;
    let handed_out = |which: &[usize]| {
        let message = |n: &usize| {
            json!({
                "MessageId": format!("m{n}"), "ReceiptHandle": format!("r{n}"), "Body": sent[*n],
            })
        };
        json!({"Messages": which.iter().map(message).collect::<Vec<_>>()}).to_string()
    };
    let failed = |id: &str| {
        json!({
            "Id": id, "SenderFault": false, "Code": "InternalError", "Message": "as SQS says",
        })
    };
    let deleted = |id: &str| json!({ "Id": id });
    // In the first batch, the deletion of the second message fails. Its next deletion fails, too.
    stub.set_responses_once("ReceiveMessage", [&[0, 1][..], &[1], &[1], &[2]].map(handed_out));
    stub.set_response("ReceiveMessage", 200, "{}");
    stub.set_delay("ReceiveMessage", Duration::from_millis(50));
    stub.set_responses_once(
        "DeleteMessageBatch",
        [
            json!({"Successful": [deleted("0")], "Failed": [failed("1")]}),
            json!({"Failed": [failed("0")]}),
        ]
        .map(|answer| answer.to_string()),
    );
    stub.set_response(
        "DeleteMessageBatch",
        200,
        &json!({"Successful": [deleted("0")]}).to_string(),
    );

    // The reconcile interval is long, so all events come from the messages.
    let mut play =
        world.command(&["play", "--no-relay", "--reconcile-after=3600", "--metrics=emf"]);
    play.env("AWS_ENDPOINT_URL", stub.endpoint()).env("PROJECTORS", folder.path());
    let play = RunningProcess::spawn(play);
    eventually("all events are played", async || {
        world.position("a").await == 30 && world.position("b").await == 30
    })
    .await;
    eventually("all messages are deleted", async || stub.call_count("DeleteMessageBatch") == 4)
        .await;
    let log = play.terminate().await.exits(0).log();
    let refusals = log
        .iter()
        .filter(|line| line["error"] == "could not delete a message: as SQS says")
        .count();
    assert_eq!(refusals, 2, "{log:?}");
    for name in ["a", "b"] {
        let of_it = log.iter().filter(|line| line["Projector"] == format!("{name}@1"));
        let skipped: u64 = of_it.filter_map(|line| line["DuplicatesSkipped"].as_u64()).sum();
        assert_eq!(
            (skipped, tally_positions(&world, name).await),
            (20, through(30)),
            "ten events are received three times"
        );
    }
}

#[tokio::test]
async fn a_projector_booted_while_play_runs_joins_without_a_restart() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a")).with("2.toml", &tally("late"));
    let only_first = Folder::new().with("1.toml", &tally("a"));
    world.run(&["boot", "--projectors", only_first.path()]).await.exits(0);
    let play = world.start(&[
        "play",
        "--receive-wait=1",
        "--reconcile-after=1",
        "--projectors",
        folder.path(),
    ]);
    world.append(20).await;
    eventually("the first projector is played", async || world.position("a").await == 20).await;
    assert_eq!(world.status("late").await, "new");
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.append(20).await;
    eventually("both projectors are played", async || {
        world.position("a").await == 40 && world.position("late").await == 40
    })
    .await;
    play.terminate().await.exits(0);
    assert_eq!(
        (tally_positions(&world, "a").await, tally_positions(&world, "late").await),
        (through(40), through(40))
    );
}

#[tokio::test]
async fn sigterm_ends_play_and_relay_quickly_while_they_are_idle() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let play =
        world.start(&["play", "--no-relay", "--receive-wait=20", "--projectors", folder.path()]);
    let relay = world.start(&["relay"]);
    world.append(5).await;
    eventually("the events are played", async || world.position("a").await == 5).await;
    eventually("the messages are deleted", async || {
        world.queue.depth().await.is_ok_and(|depth| depth == 0)
    })
    .await;
    for idle in [play, relay] {
        let began = Instant::now();
        let ended = idle.terminate().await.exits(0);
        assert!(began.elapsed() < QUICKLY, "{:?}", began.elapsed());
        assert_eq!(ended.stdout, "");
    }
    assert_eq!(
        world.number("select count(*) from event_log where relay_lease_holder is not null").await,
        0
    );
}

#[tokio::test]
async fn sigterm_during_a_batch_releases_its_messages() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &gated("a"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let mut gate = close_gate(&world).await;

    // Hidden for a long time, so that no message becomes visible by itself.
    let play =
        ["play", "--visibility-timeout=43200", "--grace-period=1", "--projectors", folder.path()];
    let worker = world.start(&play);
    world.append(5).await;
    wait_for_gated_handler(&world).await;
    let began = Instant::now();
    let ended = worker.terminate().await.exits(0);
    assert!(began.elapsed() < Duration::from_secs(1) + QUICKLY, "{:?}", began.elapsed());
    assert!(ended.log().iter().any(|line| line["level"] == "WARN"), "{}", ended.stderr);
    assert_eq!(
        (world.position("a").await, tally_positions(&world, "a").await),
        (0, vec![]),
        "the batch is rolled back"
    );
    let counts =
        [Attribute::ApproximateNumberOfMessages, Attribute::ApproximateNumberOfMessagesNotVisible];
    let request = world
        .sqs
        .get_queue_attributes()
        .queue_url(&world.queue_url)
        .set_attribute_names(Some(counts.to_vec()));
    let answer = request.send().await.expect("the queue answers");
    let count = |name| {
        answer.attributes().and_then(|all| all.get(&name)).cloned().expect("the queue has a count")
    };
    assert_ne!(count(Attribute::ApproximateNumberOfMessages), "0");
    assert_eq!(count(Attribute::ApproximateNumberOfMessagesNotVisible), "0");

    execute(&mut gate, "rollback").await;
    let played = world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(0);
    assert_ne!(played.stdout, "idle: played 0 messages\n", "the events must come from the queue");
    assert_eq!(tally_positions(&world, "a").await, through(5));
}

#[tokio::test]
async fn sigterm_during_startup_resets_no_projector() {
    let world = World::new().await;
    world.append(200).await;
    // 10 ms for each event, so that no boot completes before it is stopped.
    let slow = tally_with("a", "mode = 'from_beginning'", ":position + sleep(0.01)");
    let folder = Folder::new().with("1.toml", &slow).with("2.toml", &failing_at("poisoned", 15));
    let with_batch = ["--batch=10", "--projectors", folder.path()];
    world.run(&[&["boot"], &with_batch[..]].concat()).await.exits(1);
    assert_eq!(
        (world.status("a").await, world.status("poisoned").await),
        ("stalled".into(), "broken".into())
    );
    // The file is repaired, so both projectors have events to boot.
    folder.write("2.toml", &tally("poisoned"));
    let mut before = world.ledger.entries().await.expect("the ledger is readable");
    for (command, delays) in [
        ("play", &[0, 3, 10, 30][..]),
        ("relay", &[0, 3, 10, 30]),
        ("status", &[0, 3, 10, 30]),
        ("boot", &[0, 3, 10, 30, 100, 300]),
    ] {
        let options = if command == "boot" { &with_batch[..] } else { &with_batch[1..] };
        for delay in delays {
            let starting = world.start(&[&[command], options].concat());
            // A random time before the fault.
            tokio::time::sleep(Duration::from_millis(*delay)).await;
            let ended = starting.terminate().await;
            // Before the process handles signals, SIGTERM ends it directly. An unfinished boot
            // exits with 143.
            let is_right = matches!(ended.code, Some(0) | None)
                || (command == "boot" && ended.code == Some(143));
            assert!(is_right, "{command}: {ended:?}");

            // Waits until the server has ended the statements of the process.
            world.execute("select * from projectors for update").await;
            let now = world.ledger.entries().await.expect("the ledger is readable");
            assert_eq!(now.len(), before.len());
            for (now, before) in now.iter().zip(&before) {
                // Unchanged or, in a boot, further.
                let is_further = command == "boot"
                    && now.position >= before.position
                    && now.status == Status::Live;
                let is_as_it_was = now.status == before.status
                    && (now.position == before.position
                        || command == "boot" && now.position > before.position);
                assert!(
                    now.id == before.id && (is_as_it_was || is_further),
                    "{command}: {before:?} became {now:?}"
                );
                assert_eq!(
                    tally_positions(&world, &now.id.name).await,
                    through(now.position.get()),
                    "{command}: {now:?}"
                );
            }
            before = now;
        }
    }
    assert_eq!(world.status("a").await, "stalled", "no boot may have completed");
    world.run(&[&["boot"], &with_batch[..]].concat()).await.exits(0);
    for name in ["a", "poisoned"] {
        assert_eq!(
            (world.status(name).await, tally_positions(&world, name).await),
            ("live".into(), through(200))
        );
    }
}

#[tokio::test]
async fn sigterm_while_the_database_is_unresponsive_ends_play_and_relay_with_0() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    for command in ["play", "relay"] {
        // Accepts connections and sends nothing.
        let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let url = format!("mysql://root@{}/x", silent.local_addr().expect("the listener is bound"));
        let mut starting = world.command(&[command, "--projectors", folder.path()]);
        starting.env("DATABASE_URL", url);
        let starting = RunningProcess::spawn(starting);
        let _connected = with_short_timeout(silent.accept()).await.expect("the process connects");
        let began = Instant::now();
        starting.terminate().await.exits(0);
        assert!(began.elapsed() < QUICKLY, "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn sigterm_at_startup_ends_play_and_relay_despite_a_silent_database() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    for command in ["play", "relay"] {
        let is_silent = Arc::new(AtomicBool::new(false));
        let falls_silent = Arc::clone(&is_silent);
        let url = world
            .database_url_through_proxy(move |bytes| {
                if contains_text(bytes, "from event_log") {
                    falls_silent.store(true, Ordering::SeqCst);
                    ProxyAction::Silent
                } else {
                    ProxyAction::Forward
                }
            })
            .await;
        let mut starting = world.command(&[command, "--projectors", folder.path()]);
        starting.env("DATABASE_URL", url);
        let starting = RunningProcess::spawn(starting);
        eventually("the process reads the marks", async || is_silent.load(Ordering::SeqCst)).await;
        let began = Instant::now();
        starting.terminate().await.exits(0);
        assert!(began.elapsed() < QUICKLY, "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn every_log_line_is_json_without_a_terminal() {
    let world = World::new().await;
    world.append(10).await;
    let folder =
        Folder::new().with("1.toml", &tally("a")).with("2.toml", &failing_at("poisoned", 15));
    let mut logs = Vec::new();
    for (arguments, code) in [
        (&["boot", "--log=debug", "--projectors", folder.path()][..], 0),
        (&["append", "/no/such/file"], 2),
        (&["status", "--queue-url=x", "--database-url=mysql://root@127.0.0.1:1/x"], 3),
        (&["retire", "nobody"], 2),
    ] {
        logs.extend(world.run(arguments).await.exits(code).log());
    }
    world.append(10).await;
    logs.extend(
        world
            .run(&["play", "--until-idle", "--log=debug", "--projectors", folder.path()])
            .await
            .exits(1)
            .log(),
    );
    let play = world.start(&["play", "--projectors", folder.path()]);
    play.wait_for_log("playing").await;
    logs.extend(play.terminate().await.exits(0).log());
    assert!(logs.len() > 10, "the log has too few lines");
    for line in logs {
        for key in ["timestamp", "level", "message"] {
            assert!(line[key].is_string(), "{key} in {line}");
        }
    }
}
