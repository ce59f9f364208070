//! What a worker costs while nothing happens, and how it notices that something does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use projectionist::{Queue, RelaySettings, play};

use crate::support::{
    Folder, ProxyAction, Tally, World, contains_text, event, eventually, registry,
};

/// Every write keeps a database awake that would pause, and costs money where writes are counted.
#[tokio::test]
async fn an_idle_worker_lets_its_lease_expire_and_writes_nothing() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let folder = Folder::new().with("tally.toml", &tally.file(&[]));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let writes = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&writes);
    // The cache is off, so that each statement's text is sent again and can be counted.
    let url = world
        .database_url_through_proxy(move |bytes| {
            let is_write = ["update ", "insert ", "delete ", "replace "]
                .iter()
                .any(|write| contains_text(bytes, write));
            counted.fetch_add(u64::from(is_write), Ordering::SeqCst);
            ProxyAction::Forward
        })
        .await;
    let url = format!("{url}&statement-cache-capacity=0");
    let options = ["play", "--projectors", folder.path(), "--database-url", &url];
    let play = world.start(&options);
    let is_played = async || {
        let last = world.last_position().await;
        world.number("select published from event_log").await == last
            && world.position("tally").await == last
    };
    world.append(5).await;
    eventually("the events are published and played", is_played).await;
    let before = writes.load(Ordering::SeqCst);
    assert!(before > 0, "publishing and playing write");
    // A worker that renews its lease never lets it expire.
    eventually("the lease expires", async || {
        world.number("select relay_lease_expires_at < utc_timestamp(6) from event_log").await == 1
    })
    .await;
    assert_eq!(writes.load(Ordering::SeqCst) - before, 0, "writes of an idle worker");
    world.append(5).await;
    eventually("the events after the pause are played", is_played).await;
    play.terminate().await.exits(0);
    world.assert_complete(&tally).await;
}

/// A relay that polls rarely publishes the events of its own process at once.
#[tokio::test]
async fn an_append_of_the_same_process_ends_the_pause_of_its_relay() {
    const NEVER: Duration = Duration::from_secs(100_000);
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    let relay = RelaySettings::default().with_interval(NEVER).with_idle_interval(NEVER);
    let settings = World::continuous_play_settings().with_relay(Some(relay));
    let steps = async {
        for number in 0..3 {
            let appended = world.store.append(&[event(number)]).await.expect("it is appended");
            eventually("the event is published", async || {
                world.number("select published from event_log").await == appended.last.get()
            })
            .await;
        }
        eventually("the events are played", async || world.position("tally").await == 3).await;
    };
    let queue = Arc::clone(&world.queue) as Arc<dyn Queue>;
    play(&world.database, queue, &registry, settings, steps).await.expect("play succeeds");
    world.assert_complete(&tally).await;
}
