//! Alerts: each is logged, and posted to a webhook if one is configured. Posting never blocks the
//! work.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use projectionist::sqlx::{Connection, MySqlConnection};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::{
    Folder, ProxyAction, RunningProcess, Tally, World, certificate, contains_text, eventually,
    execute, tls_acceptor, write,
};

/// Starts a webhook that answers with these status codes in turn, repeating the last. Returns its
/// URL and the alerts that it receives. Without codes, it never answers and records a null for each
/// attempt.
async fn webhook(codes: &'static [u16]) -> (String, Arc<Mutex<Vec<Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let url =
        format!("http://{}/secret-token", listener.local_addr().expect("the listener is bound"));
    let posted = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&posted);
    tokio::spawn(async move {
        let mut silent = Vec::new();
        for turn in 0.. {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            let Some(code) = codes.get(turn).or(codes.last()) else {
                silent.push(stream);
                kept.lock().expect("the lock is not poisoned").push(Value::Null);
                continue;
            };
            let body = read_body(&mut stream).await;
            kept.lock()
                .expect("the lock is not poisoned")
                .push(serde_json::from_str(&body).unwrap_or(json!("no JSON")));
            // A redirect leads to this webhook again, so a client that follows it is noticed.
            let to = if (300..400).contains(code) { "location: /elsewhere\r\n" } else { "" };
            let answer =
                format!("HTTP/1.1 {code} X\r\n{to}content-length: 0\r\nconnection: close\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (url, posted)
}

async fn read_body(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let read = stream.read(&mut chunk).await.expect("the request is readable");
        bytes.extend_from_slice(&chunk[..read]);
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| {
            line.to_lowercase().strip_prefix("content-length: ").map(str::to_owned)
        });
        if length.and_then(|length| length.parse().ok()) == Some(body.len()) {
            return body.to_owned();
        }
    }
}

/// A folder with one projector that fails at its first event.
fn failing_projector() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("the folder is created");
    let file = "name = \"failing\"\nversion = 1\nmode = \"from_beginning\"\n\n\
                [[on]]\nevents = [\"*\"]\nsql = \"insert into nowhere values (:position)\"\n";
    std::fs::write(dir.path().join("failing.toml"), file).expect("the file is written");
    dir
}

#[tokio::test]
async fn a_broken_projector_is_posted_with_event_and_error() {
    let world = World::new().await;
    world.append(3).await;
    let projectors = failing_projector();
    let (url, posted) = webhook(&[500, 200]).await;
    let folder = projectors.path().to_str().expect("the path is UTF-8");
    let boot = world
        .run(&["boot", "--projectors", folder, "--alert-url", &url, "--release", "v7"])
        .await
        .exits(1);

    let posted = posted.lock().expect("the lock is not poisoned").clone();
    let kinds: Vec<&str> = posted.iter().filter_map(|alert| alert["alert"].as_str()).collect();
    assert_eq!(
        kinds,
        ["projector_broken", "projector_broken", "boot_failed"],
        "the rejected alert is posted again"
    );
    let broken = &posted[1];
    assert_eq!(
        (broken["projector"].as_str(), broken["position"].as_u64()),
        (Some("failing@1"), Some(1))
    );
    assert_eq!(
        (broken["event_type"].as_str(), broken["release"].as_str()),
        (Some("Opened"), Some("v7"))
    );
    assert!(broken["error"].as_str().is_some_and(|error| error.contains("nowhere")), "{broken}");
    let text = broken["text"].as_str().expect("the alert has a text");
    assert!(text.starts_with("projectionist: failing@1 broken since 2"), "{text}");
    assert!(
        text.lines().next().is_some_and(|line| line.ends_with("Z; fix it, run boot")),
        "{text}"
    );
    assert_eq!(broken["service"], "projectionist");
    assert!(posted[2]["seconds"].is_number(), "{}", posted[2]);
    assert!(
        !boot.stderr.contains("secret-token"),
        "the log contains the secret of the URL: {}",
        boot.stderr
    );

    let entry = world.entry("failing").await.expect("the projector is in the ledger");
    let failure = entry.status.failure().expect("the projector is broken");
    assert_eq!((failure.release.as_deref(), failure.attempts), (Some("v7"), 2));
    assert!(!failure.host.is_empty());
}

#[tokio::test]
async fn an_unresponsive_webhook_delays_the_end_of_boot_but_does_not_prevent_it() {
    let world = World::new().await;
    world.append(3).await;
    let projectors = failing_projector();
    let (url, _) = webhook(&[]).await;
    let began = Instant::now();
    let folder = projectors.path().to_str().expect("the path is UTF-8");
    let boot = world.run(&["boot", "--projectors", folder, "--alert-url", &url]).await.exits(1);
    assert!(began.elapsed() < Duration::from_secs(30), "the timeout of the alert was exceeded");
    assert!(
        boot.stderr.contains("\"alert\":\"projector_broken\""),
        "the alert is not in the log: {}",
        boot.stderr
    );
}

/// The kinds of the alerts that a webhook received.
fn kinds(posted: &Mutex<Vec<Value>>) -> Vec<String> {
    let posted = posted.lock().expect("the lock is not poisoned");
    posted.iter().map(|alert| alert["alert"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Asserts that one alert of this kind was posted, and returns it.
#[track_caller]
fn only(posted: &Mutex<Vec<Value>>, kind: &str) -> Value {
    assert_eq!(kinds(posted), [kind]);
    posted.lock().expect("the lock is not poisoned")[0].clone()
}

#[tokio::test]
async fn a_boot_whose_database_is_lost_alerts_once_and_exits_with_3() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    world.append(50).await;
    let projectors = Folder::new().with("tally.toml", &tally.file(&[]));
    let (batches, is_away) = (AtomicU64::new(0), AtomicBool::new(false));
    let database = world
        .database_url_through_proxy(move |bytes| {
            // The connection is reset from the third batch on.
            if contains_text(bytes, "; commit") && batches.fetch_add(1, Ordering::SeqCst) == 2 {
                is_away.store(true, Ordering::SeqCst);
            }
            if is_away.load(Ordering::SeqCst) { ProxyAction::Reset } else { ProxyAction::Forward }
        })
        .await;
    let (url, posted) = webhook(&[200]).await;
    let boot = ["boot", "--batch=10", "--connect-timeout=1", "--projectors", projectors.path()];
    let on = ["--database-url", &database, "--alert-url", &url, "--release", "v7"];
    // Boot retries for a minute.
    let failed = world.run(&[&boot[..], &on].concat()).await.exits(3);

    let alert = only(&posted, "boot_failed");
    assert_eq!(alert["error"].as_str(), Some(failed.error().as_str()), "the reason");
    assert!(failed.error().contains("gave up on the database; run it again"), "{}", failed.error());
    assert_eq!(
        (&alert["broken"], &alert["release"], &alert["released"]),
        (&json!(null), &json!("v7"), &json!(false))
    );
    assert_eq!(
        (world.status("tally").await, world.position("tally").await),
        ("booting".into(), 20)
    );
    world.run(&boot).await.exits(0);
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_stopped_deploy_alerts_once_with_its_reason_and_a_successful_one_does_not() {
    let world = World::new().await;
    world.append(20).await;
    // Slow enough to be interrupted during its work.
    let slow = Tally::new("slow").file(&["do sleep(0.1)"]);
    let projectors = Folder::new().with("slow.toml", &slow);
    let (url, posted) = webhook(&[200]).await;
    let alert = || {
        let alert = only(&posted, "boot_failed");
        posted.lock().expect("the lock is not poisoned").clear();
        assert_eq!((&alert["broken"], &alert["release"]), (&json!(null), &json!("v7")), "{alert}");
        alert["error"].as_str().expect("a reason").to_owned()
    };
    // `--log=off` does not hide this alert.
    let boot =
        ["boot", "--batch=1", "--log=off", "--alert-url", &url, "--release", "v7", "--projectors"];

    let booting = world.start(&[&boot[..], &[projectors.path()]].concat());
    eventually("boot has applied events", || async {
        world.entry("slow").await.is_some_and(|slow| slow.position.get() > 1)
    })
    .await;
    let stopped = booting.terminate().await.exits(143);
    assert!(stopped.stderr.contains("\"alert\":\"boot_failed\""), "{}", stopped.stderr);
    assert!(alert().contains("interrupted"));

    world
        .run(
            &[&boot[..], &[projectors.path(), "--database-url=mysql://root@127.0.0.1:1/x"]]
                .concat(),
        )
        .await
        .exits(3);
    assert!(alert().contains("127.0.0.1:1"));

    world.run(&[&boot[..], &[Folder::new().path()]].concat()).await.exits(2);
    assert!(alert().contains("no *.toml file"));

    world.run(&[&boot[..], &[projectors.path()]].concat()).await.exits(0);
    assert_eq!(kinds(&posted), [""; 0]);

    projectors.write("slow.toml", &slow.replace("from_beginning", "once"));
    world.run(&[&boot[..], &[projectors.path()]].concat()).await.exits(2);
    assert!(alert().contains("give it a new version"));
}

#[tokio::test]
async fn a_boot_that_a_person_interrupts_posts_no_alert_and_resumes() {
    let world = World::new().await;
    world.append(20).await;
    let slow = Tally::new("slow").file(&["do sleep(0.1)"]);
    let projectors = Folder::new().with("slow.toml", &slow);
    let (url, posted) = webhook(&[200]).await;
    let boot = ["boot", "--batch=1", "--alert-url", &url, "--projectors", projectors.path()];
    let booting = world.start(&boot);
    eventually("boot has applied events", || async {
        world.entry("slow").await.is_some_and(|slow| slow.position.get() > 1)
    })
    .await;
    // Ctrl-C sends SIGINT. A deploy that is stopped sends SIGTERM, which is an alert.
    booting.signal("INT").await;
    let stopped = booting.finish().await.exits(143);
    assert!(!stopped.stderr.contains("boot_failed"), "{}", stopped.stderr);
    stopped.prints(&["interrupted; run it again"]);
    assert_eq!(kinds(&posted), [""; 0]);
    world.run(&boot).await.exits(0);
}

#[tokio::test]
async fn a_gap_that_blocks_the_mark_is_posted_with_its_bounds() {
    let world = World::new().await;
    world.append(9).await;
    world.execute("alter table events auto_increment = 70020").await;
    world.append(2).await;
    let (url, posted) = webhook(&[200]).await;
    world.run(&["relay", "--once", "--alert-url", &url]).await.exits(0);
    let alert = only(&posted, "high_water_blocked");
    assert_eq!(
        (alert["first"].as_u64(), alert["last"].as_u64()),
        (Some(10), Some(70_019)),
        "{alert}"
    );
    assert!(
        alert["text"].as_str().is_some_and(|text| text.contains("projectionist fill 10 70019")),
        "{alert}"
    );
}

#[tokio::test]
async fn a_transaction_that_blocks_the_mark_for_long_is_posted_once_and_always_logged() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let projectors = Folder::new().with("tally.toml", &tally.file(&[]));
    world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
    let mut open = world.connection().await;
    execute(&mut open, "begin").await;
    write(&mut open, "open", 1).await.expect("the event is written");
    world.append(5).await;

    let (url, posted) = webhook(&[200]).await;
    let play = world.start(&[
        "play",
        "--log=error",
        "--alert-url",
        &url,
        "--projectors",
        projectors.path(),
    ]);
    eventually("an alert is posted", async || !kinds(&posted).is_empty()).await;
    let alert = only(&posted, "high_water_blocked");
    assert_eq!((alert["position"].as_u64(), &alert["first"]), (Some(1), &json!(null)), "{alert}");
    assert_eq!(alert["level"], "WARN");
    play.wait_for_log("\"alert\":\"high_water_blocked\"").await;

    execute(&mut open, "commit").await;
    eventually("the events are played", async || world.position("tally").await == 6).await;
    play.terminate().await.exits(0);
    assert_eq!(kinds(&posted).len(), 1, "the alert must be posted once");
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn rows_missing_at_publication_are_posted() {
    let world = World::new().await;
    let (one, other) = (Tally::new("one").file(&[]), Tally::new("other").file(&[]));
    let projectors = Folder::new().with("1.toml", &one);
    world.append(10).await;
    world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
    world.append(10).await;
    // The first projector is live already, so this boot raises the mark but publishes nothing.
    projectors.write("2.toml", &other);
    world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
    assert_eq!(
        (world.high_water().await, world.number("select published from event_log").await),
        (20, 10)
    );

    for (gone, first, last) in
        [("position in (13, 14)", 13, 14), ("position between 11 and 19", 11, 19)]
    {
        world.execute(&format!("delete from events where {gone}")).await;
        world.execute("update event_log set published = 10, relay_lease_holder = null").await;
        let (url, posted) = webhook(&[200]).await;
        world.run(&["relay", "--once", "--alert-url", &url]).await.exits(0);
        let alert = only(&posted, "log_fault");
        assert_eq!(
            (alert["first"].as_u64(), alert["last"].as_u64()),
            (Some(first), Some(last)),
            "{alert}"
        );
        assert_eq!(alert["level"], "ERROR");
        // The relay continues after the missing rows, and does not post the alert again.
        assert_eq!(world.number("select published from event_log").await, 20);
        world.run(&["relay", "--once", "--alert-url", &url]).await.exits(0);
        assert_eq!(kinds(&posted).len(), 1);
    }
}

#[tokio::test]
async fn a_row_that_vanishes_just_above_the_mark_is_posted_and_the_mark_stays() {
    let world = World::new().await;
    world.append(3).await;
    let (direct, is_deleted) = (world.database_url.clone(), AtomicBool::new(false));
    let database = world
        .database_url_through_proxy(move |bytes| {
            // The rows have been counted. The next statement computes their checksum.
            if contains_text(bytes, "bit_xor") && !is_deleted.swap(true, Ordering::SeqCst) {
                delete_second_row(&direct);
            }
            ProxyAction::Forward
        })
        .await;
    let (url, posted) = webhook(&[200]).await;
    let relay = ["relay", "--once", "--alert-url", &url];
    let published =
        world.run(&[&relay[..], &["--database-url", &database]].concat()).await.exits(0);
    assert_eq!(published.stdout, "published 0 events, up to position 0\n");
    let alert = only(&posted, "log_fault");
    let [first, last, rows] = ["first", "last", "rows"].map(|field| alert[field].as_u64());
    assert_eq!((first, last, rows), (Some(1), Some(3), Some(2)), "{alert}");
    assert_eq!(world.high_water().await, 0);
}

/// Runs on a separate thread, because the proxy's callback is synchronous.
fn delete_second_row(database_url: &str) {
    let url = database_url.to_owned();
    let delete = async move {
        let mut connection = MySqlConnection::connect(&url).await.expect("the server answers");
        execute(&mut connection, "delete from events where position = 2").await;
    };
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("the runtime starts")
    };
    std::thread::spawn(move || runtime().block_on(delete)).join().expect("the row is deleted");
}

#[tokio::test]
async fn an_unresponsive_webhook_does_not_delay_play() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    // The failing projector is played first.
    let failing = Tally::new("failing").file(&["insert into nowhere values (:position)"]);
    let projectors = Folder::new().with("1.toml", &failing).with("2.toml", &tally.file(&[]));
    world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
    let (url, posted) = webhook(&[]).await;
    let play = world.start(&["play", "--alert-url", &url, "--projectors", projectors.path()]);
    world.append(20).await;
    eventually("the webhook is called", async || !kinds(&posted).is_empty()).await;
    assert_eq!(world.status("failing").await, "broken");
    world.append(20).await;
    eventually("the other projector is played", async || world.position("tally").await == 40).await;
    assert!(
        !play.has_logged("an alert could not be posted"),
        "the alert must still wait for the webhook: {}",
        play.logged()
    );
    play.terminate().await.exits(0);
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_webhook_redirect_is_not_followed_and_counts_as_a_failure() {
    let world = World::new().await;
    world.append(9).await;
    world.execute("alter table events auto_increment = 70020").await;
    world.append(2).await;
    for code in [&[301_u16] as &'static [u16], &[302], &[307]] {
        let (url, posted) = webhook(code).await;
        let relayed = world.run(&["relay", "--once", "--alert-url", &url]).await.exits(0);
        assert_eq!(
            kinds(&posted),
            ["high_water_blocked"; 4],
            "each attempt posts to the webhook only"
        );
        assert!(relayed.stderr.contains("redirects are not followed"), "{}", relayed.stderr);
        assert!(!relayed.stderr.contains("secret-token"), "{}", relayed.stderr);
    }
}

#[tokio::test]
async fn an_alert_is_posted_by_tls_only_to_a_server_with_a_trusted_certificate() {
    let world = World::new().await;
    world.append(9).await;
    world.execute("alter table events auto_increment = 70020").await;
    world.append(2).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let port = listener.local_addr().expect("the listener is bound").port();
    let (bodies, mut posted) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let acceptor = tls_acceptor();
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let body = read_body(&mut stream).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
            bodies.send(body).expect("the test receives");
        }
    });
    let url = format!("https://ann:secret-token@localhost:{port}/");
    let relay = async |roots: &str| {
        let mut command = world.command(&["relay", "--once", "--alert-url", &url]);
        command.env("SSL_CERT_FILE", certificate(roots));
        let relayed = RunningProcess::spawn(command).finish().await.exits(0);
        assert!(!relayed.stderr.contains("secret-token"), "{}", relayed.stderr);
        relayed.stderr.contains("an alert could not be posted")
    };
    assert!(relay("other.pem").await, "the certificate is unknown");
    assert!(posted.try_recv().is_err());
    assert!(!relay("bundle.pem").await);
    let alert: Value = serde_json::from_str(&posted.recv().await.expect("a body is posted"))
        .expect("the text is JSON");
    assert_eq!(alert["alert"], "high_water_blocked");
}

/// A value of a row that the server includes in its errors.
const SECRET: &str = "ann@example.com";

#[tokio::test]
async fn errors_are_cut_to_their_numbers_in_ledger_log_and_alerts_on_request() {
    let world = World::new().await;
    for _ in 0..2 {
        world
            .store
            .append(&[projectionist::NewEvent::new(
                "a",
                "Opened",
                format!("{{\"mail\":\"{SECRET}\"}}"),
            )])
            .await
            .expect("the event is appended");
    }
    let file = "name = 'mails'\nversion = 1\nmode = 'from_beginning'\n\
                setup = ['create table if not exists mails (mail varchar(100) primary key)']\n\n\
                [[on]]\nevents = ['*']\nsql = 'insert into mails values (:payload.mail)'\n";
    let folder = Folder::new().with("mails.toml", file);
    let (url, posted) = webhook(&[200]).await;
    let boot = ["boot", "--json", "--alert-url", &url, "--projectors", folder.path()];
    let failed = world.run(&[&boot[..], &["--redact-errors"]].concat()).await.exits(1);
    let ledger = async || {
        let entry = world.entry("mails").await.expect("the projector is in the ledger");
        entry.status.failure().expect("the projector is broken").error.clone()
    };
    let error = ledger().await;
    assert!(
        error.contains("mails.toml:6") && error.ends_with("MySQL error 1062 (23000)"),
        "{error}"
    );
    let alerts = serde_json::to_string(&*posted.lock().expect("the lock is not poisoned"))
        .expect("the text is JSON");
    for text in [&failed.stderr, &failed.stdout, &alerts, &error] {
        assert!(!text.contains(SECRET), "{text}");
    }
    for text in [&failed.stderr, &failed.stdout, &alerts] {
        assert!(text.contains("MySQL error 1062 (23000)"), "{text}");
    }
    failed.log();
    let human =
        world.run(&[&boot[..], &["--redact-errors", "--log-format=human"]].concat()).await.exits(1);
    assert!(
        !human.stderr.contains(SECRET) && human.stderr.contains("MySQL error 1062"),
        "{}",
        human.stderr
    );

    // Without the option, the server's text is kept.
    world.run(&boot).await.exits(1);
    assert!(ledger().await.contains(SECRET));
}

#[tokio::test]
async fn control_characters_in_events_reach_no_terminal() {
    let world = World::new().await;
    world
        .execute(
            "insert into events (stream_id, stream_version, event_type, payload) \
             values ('a', 1, concat('Cleared', char(27), '[2J', char(10), 'forged line'), '1')",
        )
        .await;
    let folder = failing_projector();
    let folder = folder.path().to_str().expect("the path is UTF-8");
    let boot = world.run(&["boot", "--log-format=human", "--projectors", folder]).await.exits(1);
    let status = world.run(&["status", "--projectors", folder]).await.exits(0);
    let doctor = world.run(&["doctor", "--projectors", folder]).await;
    for text in [&boot.stdout, &boot.stderr, &status.stdout, &doctor.stdout] {
        assert!(
            !text.contains('\u{1b}') && !text.lines().any(|line| line.starts_with("forged")),
            "{text:?}"
        );
    }
    for text in [&boot.stdout, &boot.stderr, &status.stdout] {
        assert!(text.contains("Cleared\\u{1b}[2J\\nforged line"), "{text}");
    }
}

#[tokio::test]
async fn a_projector_that_retries_for_long_is_in_the_status_and_posted_once_and_when_it_recovers() {
    let world = World::new().await;
    let folder = Folder::new().with("slow.toml", &Tally::new("slow").file(&[]));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.execute("create table refusing select 1 as n").await;
    world
        .execute(
            "create trigger refuse before insert on slow for each row \
             if exists (select 1 from refusing) then \
             signal sqlstate 'HY000' set mysql_errno = 1205, message_text = 'Lock wait timeout'; \
             end if",
        )
        .await;
    let (url, posted) = webhook(&[200]).await;
    let options = ["--projectors", folder.path(), "--alert-url", &url, "--retry-alert-after=1"];
    let playing = world.start(&[&["play"], &options[..]].concat());
    world.append(3).await;
    eventually("the alert is posted", async || !kinds(&posted).is_empty()).await;
    let alert = only(&posted, "projector_retrying");
    assert_eq!((&alert["projector"], &alert["position"]), (&json!("slow@1"), &json!(1)));
    let error = alert["error"].as_str().expect("the error is text");
    assert!(error.contains("slow.toml:") && error.contains("1205"), "{error}");

    let status = world.run(&["status"]).await.exits(0).stdout;
    let status = status.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in ["slow@1", "retrying since 20", " attempts: ", "1205", "Lock wait timeout"] {
        assert!(status.contains(part), "{status}");
    }
    let json = world.run(&["status", "--json"]).await.exits(0).json();
    let retrying = json["projectors"][0]["retrying"].as_object().expect("it retries").clone();
    let keys: Vec<&str> = retrying.keys().map(String::as_str).collect();
    assert_eq!(keys, ["attempts", "error", "next_attempt", "since"]);

    world.execute("delete from refusing").await;
    eventually("the recovery is posted", async || {
        kinds(&posted) == ["projector_retrying", "projector_recovered"]
    })
    .await;
    playing.terminate().await.exits(0);
    let json = world.run(&["status", "--json"]).await.exits(0).json();
    assert_eq!(json["projectors"][0]["retrying"], json!(null));
}
