//! Broken connections: some are reset, others stop forwarding without closing.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use projectionist::sqlx::mysql::MySqlConnectOptions;
use projectionist::{Database, Ledger, Limits, Queue, boot, play};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::support::{
    Folder, Proxy, ProxyAction, RunningProcess, TIMEOUT, Tally, World, contains_text, eventually,
    kill, registry, registry_of, run, scripted_at,
};

/// COM_PING, as the driver sends it.
const PING: &[u8] = b"\x01\x00\x00\x00\x0e";

/// A transient error must not break a projector, however often in a row it occurs. The test resets
/// eleven connections, one more than the limit after which a handler is blamed for an oversized
/// packet.
#[tokio::test]
async fn repeated_connection_resets_break_no_projector() {
    let world = World::new().await;
    // Subscribes to a single event, so that a failing batch is not retried event by event.
    let tally = Tally::new("tally").only(&["Closed"]);
    let resets = Arc::new(AtomicU64::new(0));
    let (counted, is_down) = (Arc::clone(&resets), AtomicBool::new(false));
    let url = world
        .database_url_through_proxy(move |bytes| {
            if contains_text(bytes, "select 'at the poison'") && counted.load(Ordering::SeqCst) < 11
            {
                counted.fetch_add(1, Ordering::SeqCst);
                is_down.store(true, Ordering::SeqCst);
                return ProxyAction::Reset;
            }
            // The ping after a reset fails, too, so the server looks unreachable.
            if bytes == PING && is_down.swap(false, Ordering::SeqCst) {
                ProxyAction::Reset
            } else {
                ProxyAction::Forward
            }
        })
        .await;
    let database = Database::connect(&url, 8, TIMEOUT).await.expect("the server answers");
    let registry =
        registry_of([scripted_at(&tally, 3, |db| Box::pin(run(db, "select 'at the poison'")))]);
    world.append(5).await;
    let report =
        boot(&database, &registry, Limits::default(), |_| {}).await.expect("boot succeeds");
    assert!(report.is_released(), "{report:?}");
    assert_eq!(resets.load(Ordering::SeqCst), 11);
    world.assert_complete(&tally).await;
}

/// Silences connections once armed: each entry's action applies to the first connection on which
/// its text is sent.
struct SilentConnections {
    waiting: Mutex<HashSet<(&'static str, ProxyAction)>>,
    is_armed: AtomicBool,
}

impl SilentConnections {
    fn decide(&self, bytes: &[u8]) -> ProxyAction {
        if !self.is_armed.load(Ordering::SeqCst) {
            return ProxyAction::Forward;
        }
        let mut waiting = self.waiting.lock().expect("the lock is not poisoned");
        let sent = waiting.iter().copied().find(|(text, _)| contains_text(bytes, text));
        sent.filter(|sent| waiting.remove(sent)).map_or(ProxyAction::Forward, |(_, action)| action)
    }

    fn arm(&self) {
        self.is_armed.store(true, Ordering::SeqCst);
    }

    /// The entries that have not occurred yet.
    fn waiting(&self) -> HashSet<(&'static str, ProxyAction)> {
        self.waiting.lock().expect("the lock is not poisoned").clone()
    }
}

/// Connects to the world's database through such a proxy, with a short statement timeout.
async fn connect_with_silences(
    world: &World,
    silent: &[(&'static str, ProxyAction)],
) -> (Database, Arc<SilentConnections>) {
    let waiting = Mutex::new(silent.iter().copied().collect());
    let silences = Arc::new(SilentConnections { waiting, is_armed: AtomicBool::new(false) });
    let deciding = Arc::clone(&silences);
    let url = world.database_url_through_proxy(move |bytes| deciding.decide(bytes)).await;
    // The cache is off, so that each statement's text is sent again and can be recognized.
    let url = format!("{url}&statement-cache-capacity=0");
    let database = Database::connect(&url, 8, TIMEOUT).await.expect("the server answers");
    (database.with_statement_timeout(Duration::from_secs(2)), silences)
}

/// Boots and plays one projector through connections that fall silent, and asserts that it
/// recovers.
async fn assert_survives_silence(
    in_boot: &[(&'static str, ProxyAction)],
    in_play: &[(&'static str, ProxyAction)],
) {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let limits = Limits::default()
        .with_batch(10)
        .with_handler_timeout(Duration::from_secs(2))
        .with_retry_timeout(Some(TIMEOUT));
    let handling = |position| {
        registry_of([scripted_at(&tally, position, |db| {
            Box::pin(run(db, "select 'in the handler'"))
        })])
    };

    world.append(40).await;
    let (database, silences) = connect_with_silences(&world, in_boot).await;
    silences.arm();
    let report = boot(&database, &handling(25), limits, |_| {}).await.expect("boot succeeds");
    assert!(report.is_released(), "{report:?}");
    assert_eq!(silences.waiting(), HashSet::new());
    world.assert_complete(&tally).await;

    let (database, silences) = connect_with_silences(&world, in_play).await;
    let steps = async {
        world.append(1).await;
        eventually("the first event is played", async || world.position("tally").await == 41).await;
        silences.arm();
        world.append(29).await;
        eventually("all entries have occurred", async || {
            // An idle relay sends nothing that an entry waits for.
            Box::pin(world.append(1)).await;
            silences.waiting().is_empty()
        })
        .await;
        let last = world.last_position().await;
        eventually("the projector is at the end", async || world.position("tally").await == last)
            .await;
    };
    let queue = Arc::clone(&world.queue) as Arc<dyn Queue>;
    let settings = World::continuous_play_settings().with_limits(limits);
    let registry = handling(65);
    let playing = Box::pin(play(&database, queue, &registry, settings, Box::pin(steps)));
    assert_eq!(playing.await.expect("play succeeds").broken, 0);
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_silent_handler_connection_is_closed_and_each_event_applied_once() {
    let in_the_handler = [("select 'in the handler'", ProxyAction::Silent)];
    assert_survives_silence(&in_the_handler, &in_the_handler).await;
}

#[tokio::test]
async fn a_silent_ledger_connection_is_closed_and_each_event_applied_once() {
    // Before the row is locked, and after it is released. In between, the server holds the lock
    // until it ends the session.
    let ledger = [
        ("start transaction", ProxyAction::Silent),
        ("; commit", ProxyAction::Withheld),
        ("from projectors", ProxyAction::Silent),
    ];
    assert_survives_silence(&ledger, &ledger).await;
}

/// A setup has no time limit. It is aborted when the server no longer has its session.
#[tokio::test]
async fn a_setup_on_a_silent_connection_is_aborted_and_run_again() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    world.append(10).await;
    let (database, silences) =
        connect_with_silences(&world, &[("create table if not exists", ProxyAction::Withheld)])
            .await;
    silences.arm();
    let ending = async {
        eventually("the answer is withheld", async || silences.waiting().is_empty()).await;
        // The server ends a session by itself when it has been silent for a minute.
        kill(&mut world.connection().await, world.sessions().await).await;
    };
    let limits = Limits::default().with_retry_timeout(Some(TIMEOUT));
    let registry = registry_of([tally.clone()]);
    let (report, ()) = tokio::join!(boot(&database, &registry, limits, |_| {}), ending);
    assert!(report.expect("boot succeeds").is_released());
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_connection_silent_during_reading_or_publishing_is_closed() {
    let log = [("from event_log", ProxyAction::Silent), ("from events", ProxyAction::Silent)];
    let relay =
        [("set relay_lease_holder", ProxyAction::Silent), ("set published", ProxyAction::Withheld)];
    assert_survives_silence(&log, &[log, relay].concat()).await;
}

/// The relay is killed after the queue has accepted a message and before the relay records it.
#[tokio::test]
async fn a_relay_killed_between_sending_and_recording_loses_nothing() {
    for (world, sent_again) in [(World::new().await, 0), (World::with_standard_queue().await, 1)] {
        let tally = Tally::new("tally");
        let registry = registry(&[&tally]);
        world.boot(&registry).await;
        world.append(60).await;
        let sends = AtomicU64::new(0);
        let proxy = Proxy::for_queue(move |bytes| {
            let is_second = contains_text(bytes, "AmazonSQS.SendMessage")
                && sends.fetch_add(1, Ordering::SeqCst) == 1;
            if is_second { ProxyAction::Withheld } else { ProxyAction::Forward }
        })
        .await;
        let mut relay = world.command(&["relay", "--message-events", "20"]);
        relay.env("AWS_ENDPOINT_URL", format!("http://{}", proxy.address()));
        let relay = RunningProcess::spawn(relay);
        eventually("the queue has accepted the second message", async || proxy.withheld() > 0)
            .await;
        assert!(relay.kill().await, "the relay was running");
        assert_eq!(world.number("select published from event_log").await, 20);
        assert_eq!(world.queue.depth().await.expect("the queue answers"), 2);

        let published = world.run(&["relay", "--once", "--message-events", "20"]).await.exits(0);
        assert!(
            published.stdout.contains("published 40 events, up to position 60"),
            "{}",
            published.stdout
        );
        assert_eq!(world.queue.depth().await.expect("the queue answers"), 3 + sent_again);
        assert_eq!(world.play_until_idle(&registry).await.messages, 3 + sent_again);
        world.assert_complete(&tally).await;
    }
}

#[tokio::test]
async fn a_server_that_is_gone_is_named_as_the_cause() {
    let world = World::new().await;
    let options: MySqlConnectOptions = world.database_url.parse().expect("a URL");
    let server = format!("{}:{}", options.get_host(), options.get_port());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let here = listener.local_addr().expect("it is bound").to_string();
    let url = world.database_url.replace(&server, &here);
    let forwarding = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut client, _)) = listener.accept().await {
            let mut server = TcpStream::connect(&server).await.expect("the server answers");
            connections.spawn(async move {
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let database = Database::connect(&url, 4, Duration::from_secs(1)).await.expect("it answers");
    let ledger = Ledger::new(&database);
    ledger.entries().await.expect("the server answers");

    forwarding.abort();
    let _ = forwarding.await;

    // The first error is that of the open connection.
    ledger.entries().await.expect_err("the connection is lost");
    let error = ledger.entries().await.expect_err("the server is gone").to_string();
    assert!(error.contains("Connection refused"), "{error}");
}

/// After a failover by DNS, the connections to the old primary may stay open and never answer.
#[tokio::test]
async fn a_worker_recovers_from_a_silent_database_after_the_statement_timeout() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let folder = Folder::new().with("tally.toml", &tally.file(&[]));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let (proxy, url) = world.database_proxy(|_| ProxyAction::Forward).await;
    let options = ["--projectors", folder.path(), "--database-url", &url];
    let play = world.start(&[&["play", "--statement-timeout", "2"], &options[..]].concat());
    for count in [10, 20] {
        world.append(10).await;
        eventually("the events are played", async || world.position("tally").await == count).await;
        proxy.silence();
    }
    world.append(10).await;
    eventually("the events are played", async || world.position("tally").await == 30).await;
    play.terminate().await.exits(0);
    world.assert_complete(&tally).await;
}
