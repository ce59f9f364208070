//! Alerts: a log line always, an HTTP POST where one is named, and never in the way of the work.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::World;

/// A web hook that answers with these status codes in turn, the last one for ever, and keeps what it gets.
/// Without any, it never answers.
async fn webhook(codes: &'static [u16]) -> (String, Arc<Mutex<Vec<Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/secret-token", listener.local_addr().expect("bound"));
    let posted = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&posted);
    tokio::spawn(async move {
        let mut silent = Vec::new();
        for turn in 0.. {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            let Some(code) = codes.get(turn).or(codes.last()) else {
                silent.push(stream);
                continue;
            };
            let body = read_body(&mut stream).await;
            kept.lock().expect("no panic").push(serde_json::from_str(&body).expect("JSON"));
            let answer = format!("HTTP/1.1 {code} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (url, posted)
}

async fn read_body(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let read = stream.read(&mut chunk).await.expect("a request");
        bytes.extend_from_slice(&chunk[..read]);
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ").map(str::to_owned));
        if length.and_then(|length| length.parse().ok()) == Some(body.len()) {
            return body.to_owned();
        }
    }
}

/// A folder with one projector that fails at its first event.
fn failing_projector() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let file = "name = \"failing\"\nversion = 1\nmode = \"from_beginning\"\n\n\
                [[on]]\nevents = [\"*\"]\nsql = \"insert into nowhere values (:position)\"\n";
    std::fs::write(dir.path().join("failing.toml"), file).expect("a file");
    dir
}

#[tokio::test]
async fn what_breaks_a_projector_is_posted_with_all_that_is_known_of_it() {
    let world = World::new().await;
    world.append(3).await;
    let projectors = failing_projector();
    let (url, posted) = webhook(&[500, 200]).await;
    let folder = projectors.path().to_str().expect("UTF-8");
    let boot = world.run(&["boot", "--projectors", folder, "--alert-url", &url, "--release", "v7"]).await.exits(1);

    let posted = posted.lock().expect("no panic").clone();
    let kinds: Vec<&str> = posted.iter().filter_map(|alert| alert["alert"].as_str()).collect();
    assert_eq!(kinds, ["projector_broken", "projector_broken", "boot_failed"], "refused once, and posted again");
    let broken = &posted[1];
    assert_eq!((broken["projector"].as_str(), broken["position"].as_u64()), (Some("failing@1"), Some(1)));
    assert_eq!((broken["event_type"].as_str(), broken["release"].as_str()), (Some("Opened"), Some("v7")));
    assert!(broken["error"].as_str().is_some_and(|error| error.contains("nowhere")), "{broken}");
    assert!(broken["text"].as_str().is_some_and(|text| text.contains("failing@1")), "{broken}");
    assert!(!boot.stderr.contains("secret-token"), "the URL may hold a secret: {}", boot.stderr);

    let entry = world.entry("failing").await.expect("it is in the ledger");
    let failure = entry.status.failure().expect("it is broken");
    assert_eq!((failure.release.as_deref(), failure.attempts), (Some("v7"), 2));
    assert!(!failure.host.is_empty());
}

#[tokio::test]
async fn a_web_hook_that_never_answers_delays_the_end_of_a_boot_but_does_not_prevent_it() {
    let world = World::new().await;
    world.append(3).await;
    let projectors = failing_projector();
    let (url, _) = webhook(&[]).await;
    let began = Instant::now();
    let folder = projectors.path().to_str().expect("UTF-8");
    let boot = world.run(&["boot", "--projectors", folder, "--alert-url", &url]).await.exits(1);
    assert!(began.elapsed() < Duration::from_secs(30), "its time-out bounds it");
    assert!(boot.stderr.contains("\"alert\":\"projector_broken\""), "the log has it: {}", boot.stderr);
}
