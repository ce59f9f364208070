//! How a worker shares its connections: among its projectors, and with callers of the library.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use projectionist::sqlx::{self, MySqlConnection};
use projectionist::{Database, EventStore, NewEvent, Queue, Registry, play};

use crate::support::{
    ScriptedProjector, TIMEOUT, Tally, World, eventually, execute, registry, write,
};

/// If the least recently used session were closed first, each projector would open a new one for
/// each message.
#[tokio::test]
async fn with_more_projectors_than_sessions_some_projectors_keep_their_session() {
    let world = World::new().await;
    // Four connections are for handlers.
    let database = Database::connect(&world.database_url, 8, TIMEOUT).await.expect("it answers");
    let used: Arc<Mutex<BTreeMap<String, Vec<u64>>>> = Arc::default();
    let mut registry = Registry::new();
    let names: Vec<String> = (0..6).map(|number| format!("tally_{number}")).collect();
    for name in &names {
        let (used, name) = (Arc::clone(&used), name.clone());
        let tally = Tally::new(&name);
        let projector = ScriptedProjector::new(&tally, move |_, db: &mut MySqlConnection| {
            let (used, name) = (Arc::clone(&used), name.clone());
            Box::pin(async move {
                let id = sqlx::query_scalar("select connection_id()").fetch_one(db).await?;
                used.lock().expect("no panic").entry(name).or_default().push(id);
                Ok(())
            })
        });
        registry.add(projector).expect("the names are unique");
    }
    world.boot(&registry).await;

    const MESSAGES: usize = 6;
    let steps = async {
        for count in 1..=MESSAGES {
            world.append(1).await;
            eventually("every projector has the event", async || {
                let used = used.lock().expect("no panic");
                names.iter().all(|name| used.get(name).is_some_and(|ids| ids.len() == count))
            })
            .await;
        }
    };
    let queue = Arc::clone(&world.queue) as Arc<dyn Queue>;
    let settings = World::continuous_play_settings();
    play(&database, queue, &registry, settings, steps).await.expect("play succeeds");
    let used = used.lock().expect("no panic");
    let opened: BTreeSet<u64> = used.values().flatten().copied().collect();
    // Three projectors of six find their session again with each message after the first one.
    assert!(opened.len() <= 6 + 5 * 4, "{} sessions: {used:?}", opened.len());
}

/// Callers that wait for the database must not keep play waiting, although they use its
/// connections.
#[tokio::test]
async fn callers_of_the_library_leave_half_of_the_connections_to_play() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.append(40).await;
    // Eight connections are for the program's own statements.
    let database = Database::connect(&world.database_url, 16, TIMEOUT).await.expect("it answers");
    let mut rival = world.connection().await;
    execute(&mut rival, "begin").await;
    write(&mut rival, "contended", 1).await.expect("written");
    let event = || NewEvent {
        event_id: None,
        stream_id: "contended".into(),
        stream_version: Some(1),
        event_type: "Opened".into(),
        recorded_at: None,
        payload: "{}".into(),
        metadata: None,
    };
    let callers: Vec<_> = (0..20)
        .map(|_| {
            let store = EventStore::new(&database);
            let event = event();
            tokio::spawn(async move { store.append(&[event]).await })
        })
        .collect();
    let waiting = async || {
        let sessions = world.sessions().await;
        let is_insert = |statement: &str| statement.contains("insert into events");
        sessions.iter().filter(|session| is_insert(&session.statement)).count()
    };
    eventually("four callers wait for the rival", async || waiting().await >= 4).await;
    let steps = async {
        eventually("play applies the events", async || world.position("tally").await == 40).await;
        assert_eq!(waiting().await, 4);
    };
    let queue = Arc::clone(&world.queue) as Arc<dyn Queue>;
    let settings = World::continuous_play_settings();
    play(&database, queue, &registry, settings, steps).await.expect("play succeeds");
    callers.iter().for_each(|caller| caller.abort());
    world.assert_folded(&tally).await;
}

/// Another worker's handler may hold a projector's row for longer than a statement may take.
#[tokio::test]
async fn a_claim_that_waits_for_the_row_is_not_taken_for_a_lost_connection() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.append(3).await;
    let database = Database::connect(&world.database_url, 8, TIMEOUT)
        .await
        .expect("it answers")
        .with_statement_timeout(Duration::from_secs(1));
    let mut rival = world.connection().await;
    execute(&mut rival, "begin").await;
    execute(&mut rival, "select * from projectors for update").await;
    let steps = async {
        let claims = async || {
            let sessions = world.sessions().await;
            let is_claim = |statement: &str| statement.starts_with("update projectors set part");
            sessions
                .iter()
                .filter(|session| is_claim(&session.statement))
                .map(|session| session.id)
                .collect::<Vec<_>>()
        };
        eventually("the projector waits", async || !claims().await.is_empty()).await;
        let first = claims().await;
        // The server counts the seconds.
        execute(&mut world.connection().await, "do sleep(3)").await;
        assert_eq!(claims().await, first, "the same session waits on");
        execute(&mut rival, "rollback").await;
        eventually("the events are applied", async || world.position("tally").await == 3).await;
    };
    let queue = Arc::clone(&world.queue) as Arc<dyn Queue>;
    let settings = World::continuous_play_settings();
    play(&database, queue, &registry, settings, steps).await.expect("play succeeds");
    world.assert_complete(&tally).await;
}
