//! The high-water mark: no event is applied before every lower position is decided, however long a
//! writer takes. No event is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use projectionist::{AppendError, Database, EventStore, Limits, NewEvent, Queue, boot};

use crate::support::{
    FaultyQueue, Gate, RandomCuts, Session, TIMEOUT, Tally, World, event, eventually, execute,
    gated, is_mariadb, registry, registry_of, seed, server_error, write,
};

#[tokio::test]
async fn a_late_commit_is_never_skipped() {
    let world = World::new().await;
    let (replayed, played) = (Tally::new("replayed"), Tally::new("played"));
    world.append(9).await;
    world.boot(&registry(&[&played])).await;
    let mut slow = world.connection().await;
    execute(&mut slow, "begin").await;
    write(&mut slow, "slow", 1).await.expect("the event is written");
    write(&mut world.connection().await, "fast", 1).await.expect("the event is written");
    assert_eq!(world.positions("position > 9").await, [11], "the later position is visible first");

    let published = world.run(&["relay", "--once"]).await.exits(0);
    assert!(published.stdout.contains("up to position 9"), "{}", published.stdout);
    world.boot_while_blocked(&registry(&[&replayed])).await;
    assert_eq!(replayed.applied(&world).await, (1..=9).collect::<Vec<_>>());

    let queue = Arc::new(FaultyQueue::without_faults(&world.queue));
    let both = registry(&[&replayed, &played]);
    let playing = world.start_play_from(
        Arc::clone(&queue) as Arc<dyn Queue>,
        &both,
        World::continuous_play_settings(),
    );
    // Each empty receive is followed by a reconcile, so the worker has looked for missing events
    // many times.
    eventually("the worker has reconciled repeatedly", async || {
        queue.fault_counts().receives >= 20
    })
    .await;
    for tally in [&replayed, &played] {
        assert_eq!((world.position(tally.name()).await, world.high_water().await), (9, 9));
        assert_eq!(tally.applied(&world).await, (1..=9).collect::<Vec<_>>());
    }
    let status = world.run(&["status", "--json"]).await.exits(0).json();
    assert_eq!((status["high_water"].as_u64(), status["published"].as_u64()), (Some(9), Some(9)));

    execute(&mut slow, "commit").await;
    assert!(world.boot(&registry(&[&replayed])).await.is_released());
    eventually("both projectors are at the end", async || {
        world.position("replayed").await == 11 && world.position("played").await == 11
    })
    .await;
    playing.stop().await;
    for tally in [&replayed, &played] {
        assert_eq!(tally.applied(&world).await, (1..=11).collect::<Vec<_>>());
    }
    assert!(world.fillers().await.is_empty());
}

#[tokio::test]
async fn a_position_reserved_before_its_insert_is_not_lost() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.append(9).await;

    let mut holder = world.connection().await;
    execute(&mut holder, "begin").await;
    let insert =
        "insert into events (event_id, stream_id, stream_version, event_type, payload) values ";
    execute(&mut holder, &format!("{insert} ('wanted', 'holder', 1, 'Opened', '{{}}')")).await;
    let mut blocked = world.connection().await;
    let rows = ["first", "wanted", "third", "fourth"].iter().zip(1..);
    let rows: Vec<String> = rows
        .map(|(id, version)| format!("('{id}', 'blocked', {version}, 'Opened', '{{}}')"))
        .collect();
    let rows = format!("{insert} {}", rows.join(", "));
    let blocked = tokio::spawn(async move { execute(&mut blocked, &rows).await });
    eventually("the multi-row insert is blocked at its second row", async || {
        world.lock_waits().await == 1
    })
    .await;
    // Position 10 belongs to the holder. 11 is inserted, 12 is blocked, 13 and 14 are only
    // reserved.
    write(&mut world.connection().await, "fast", 1).await.expect("the event is written");
    assert_eq!(world.positions("position > 9").await, [15]);

    world.boot_while_blocked(&registry).await;
    assert_eq!((world.position("tally").await, world.high_water().await), (9, 9));
    assert!(!blocked.is_finished() && world.fillers().await.is_empty());

    execute(&mut holder, "rollback").await;
    blocked.await.expect("the writer does not fail");
    assert!(world.boot(&registry).await.is_released());
    world.play_until_idle(&registry).await;
    assert_eq!(world.positions("stream_id = 'blocked'").await, [11, 12, 13, 14]);
    assert_eq!(world.fillers().await, [10]);
    world.assert_complete(&tally).await;
}

/// `insert … select` reserves positions in growing blocks. On MySQL, other writers get positions in
/// between. With MariaDB's default (`innodb_autoinc_lock_mode` 1), other writers wait until the
/// statement ends, so only the waiting can be tested there.
#[tokio::test]
async fn rows_from_an_insert_select_are_not_lost_among_other_writers() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.append(9).await;
    world
        .execute("create table source (id varchar(64) primary key, version bigint not null)")
        .await;
    let rows: Vec<String> = (1..=40).map(|n| format!("('row-{n:02}', {n})")).collect();
    world.execute(&format!("insert into source values {}", rows.join(", "))).await;

    // The twentieth row waits for this writer, which holds the same event id.
    let mut holder = world.connection().await;
    execute(&mut holder, "begin").await;
    let insert = "insert into events (event_id, stream_id, stream_version, event_type, payload) ";
    execute(&mut holder, &format!("{insert} values ('row-20', 'holder', 1, 'Opened', '{{}}')"))
        .await;
    let mut copying = world.connection().await;
    let copy =
        format!("{insert} select id, 'copied', version, 'Opened', '{{}}' from source order by id");
    let copying = tokio::spawn(async move { execute(&mut copying, &copy).await });
    eventually("the copy is blocked at its twentieth row", async || world.lock_waits().await == 1)
        .await;

    let mut other = world.connection().await;
    let other =
        tokio::spawn(
            async move { write(&mut other, "other", 1).await.expect("the event is written") },
        );
    if is_mariadb().await {
        // The writer waits for the table's counter. The server does not list this wait as a
        // transaction's lock wait.
        let waits = |session: &&Session| {
            session.state == "Update" && session.statement.starts_with("insert")
        };
        eventually("the other writer waits for the statement", async || {
            world.sessions().await.iter().filter(waits).count() == 1
        })
        .await;
    } else {
        eventually("the other writer is done", async || other.is_finished()).await;
    }
    // On MariaDB, no event above the mark is visible yet.
    if is_mariadb().await {
        assert!(world.boot(&registry).await.is_released());
    } else {
        world.boot_while_blocked(&registry).await;
    }
    assert_eq!((world.position("tally").await, world.high_water().await), (9, 9));

    execute(&mut holder, "rollback").await;
    copying.await.expect("the copy does not fail");
    other.await.expect("the other writer does not fail");
    assert!(world.boot(&registry).await.is_released());
    world.play_until_idle(&registry).await;
    let (copied, other) = (
        world.positions("stream_id = 'copied'").await,
        world.positions("stream_id = 'other'").await,
    );
    assert_eq!((copied.len(), other.len()), (40, 1));
    if !is_mariadb().await {
        assert!(copied[0] < other[0] && other[0] < copied[39], "{copied:?} around {other:?}");
    }
    assert!(world.fillers().await.contains(&10));
    world.assert_complete(&tally).await;
}

/// A server with a lax `sql_mode` stores invalid dates.
#[tokio::test]
async fn a_row_without_a_date_stops_no_projector() {
    let world = World::new().await;
    let (tally, later) = (Tally::new("tally"), Tally::new("later"));
    world.boot(&registry(&[&tally])).await;
    let mut lax = world.connection().await;
    execute(&mut lax, "set session sql_mode = ''").await;
    for (version, date) in (1..).zip(["0000-00-00", "2020-00-10", "2020-02-00"]) {
        let columns = "stream_id, stream_version, event_type, recorded_at, payload";
        execute(
            &mut lax,
            &format!(
                "insert into events ({columns}) values ('undated', {version}, 'Happened', \
                 '{date}', '{{}}')"
            ),
        )
        .await;
    }
    world.append(5).await;
    // `status` computes how long the next event has been waiting, from this date.
    world.run(&["status"]).await.exits(0);

    world.play_until_idle(&registry(&[&tally])).await;
    assert!(world.boot(&registry(&[&tally, &later])).await.is_released());
    assert_eq!(world.positions("position <= 3").await, [1, 2, 3]);
    for tally in [&tally, &later] {
        world.assert_complete(tally).await;
    }
}

#[tokio::test]
async fn a_large_open_transaction_is_not_mistaken_for_a_gap() {
    let world = World::new().await;
    let tally = Tally::new("tally").only(&["Closed"]);
    let registry = registry(&[&tally]);
    world.append(9).await;
    let mut large = world.connection().await;
    execute(&mut large, "begin").await;
    execute(
        &mut large,
        "insert into events (stream_id, stream_version, event_type, payload) \
         with recursive n as (select 1 as n union all select n + 1 from n where n < 1000), \
         m as (select 1 as m union all select m + 1 from m where m < 70) \
         select concat('large-', m), n, if(n = 1, 'Closed', 'Opened'), '{}' from m join n",
    )
    .await;
    write(&mut world.connection().await, "small", 1).await.expect("the event is written");
    let published = world.run(&["relay", "--once"]).await.exits(0);
    assert!(published.stdout.contains("up to position 9"), "{}", published.stdout);
    assert!(!published.stderr.contains("high_water_blocked"), "{}", published.stderr);

    execute(&mut large, "commit").await;
    boot(&world.database, &registry, Limits::default(), |_| {}).await.expect("boot succeeds");
    assert!(world.last_position().await > 70_000);
    world.assert_complete(&tally).await;
}

/// How many transactions each of the eight writers makes. Each writer has its own streams.
const TRANSACTIONS: u64 = 40;

#[derive(Default)]
struct Written {
    events: AtomicU64,
    rollbacks: AtomicU64,
}

impl Written {
    fn add(&self, events: u64) {
        self.events.fetch_add(events, Ordering::SeqCst);
    }
}

/// Writes with plain SQL: multi-row inserts, slow commits and rollbacks.
async fn write_by_sql(
    mut writer: MySqlConnection,
    stream: String,
    mut dice: fastrand::Rng,
    written: Arc<Written>,
) {
    let mut version = 0;
    for _ in 0..TRANSACTIONS {
        let (rows, rolls_back) = (dice.u64(1..=8), dice.u8(0..100) < 15);
        let pause = format!("select sleep({})", f64::from(dice.u8(0..30)) / 1000.0);
        loop {
            execute(&mut writer, "begin").await;
            let values: Vec<String> = (1..=rows)
                .map(|row| {
                    format!(
                        "('{stream}', {}, '{}', '{{}}')",
                        version + row,
                        ["Opened", "Closed"][row as usize % 2]
                    )
                })
                .collect();
            let insert = format!(
                "insert into events (stream_id, stream_version, event_type, payload) values {}",
                values.join(", ")
            );
            match sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut writer).await {
                Ok(_) => break,
                // The protocol requires every writer to retry after these errors.
                Err(error) => {
                    assert!([1062, 1205, 1213].contains(&server_error(&error).0), "{error}");
                    execute(&mut writer, "rollback").await;
                }
            }
        }
        execute(&mut writer, &pause).await;
        execute(&mut writer, if rolls_back { "rollback" } else { "commit" }).await;
        if rolls_back {
            written.rollbacks.fetch_add(1, Ordering::SeqCst);
        } else {
            version += rows;
            written.add(rows);
        }
    }
}

/// Writes through the store. A rollback is an append whose last event is rejected.
async fn write_by_append(
    store: EventStore,
    stream: String,
    mut dice: fastrand::Rng,
    written: Arc<Written>,
) {
    for transaction in 0..TRANSACTIONS {
        let rows = dice.u64(1..=8);
        let mut events: Vec<NewEvent> = (0..rows)
            .map(|row| NewEvent { stream_id: stream.clone(), ..event(row as usize) })
            .collect();
        if transaction > 0 && dice.u8(0..100) < 15 {
            events.push(NewEvent { event_id: Some(stream.clone()), ..event(0) });
            let refused = store.append(&events).await.expect_err("the id is taken");
            assert!(matches!(refused, AppendError::DuplicateEventId { .. }), "{refused}");
            written.rollbacks.fetch_add(1, Ordering::SeqCst);
            continue;
        }
        if transaction == 0 {
            events[0].event_id = Some(stream.clone());
        }
        store.append(&events).await.expect("the events are appended");
        written.add(rows);
    }
}

/// Watches the mark until `stop` is set. Asserts that it never falls and that every position up to
/// it is decided. Returns how often it rose.
async fn watch_mark(mut watcher: MySqlConnection, stop: Arc<AtomicBool>) -> u64 {
    let (mut before, mut rises) = (0, 0);
    while !stop.load(Ordering::SeqCst) {
        // One statement reads both tables from one snapshot.
        let (mark, visible): (u64, i64) = sqlx::query_as(
            "select high_water, (select count(*) from events where position <= high_water) \
             from event_log",
        )
        .fetch_one(&mut watcher)
        .await
        .expect("the mark is readable");
        assert_eq!(mark, visible as u64, "the mark has passed an undecided position");
        assert!(mark >= before, "the mark went back from {before} to {mark}");
        rises += u64::from(mark > before);
        before = mark;
    }
    rises
}

#[tokio::test]
async fn eight_writers_at_once_make_no_projector_miss_or_repeat_an_event() {
    let world = World::new().await;
    let mut dice = fastrand::Rng::with_seed(seed());
    let tallies = [
        Tally::new("all_events"),
        Tally::new("closed").only(&["Closed"]),
        Tally::new("joined_late"),
    ];
    world.boot(&registry(&[&tallies[0], &tallies[1]])).await;
    let registry = registry(&[&tallies[0], &tallies[1], &tallies[2]]);
    let playing = world.start_play(&registry);
    let stop = Arc::new(AtomicBool::new(false));
    let watching = tokio::spawn(watch_mark(world.connection().await, Arc::clone(&stop)));

    let written = Arc::new(Written::default());
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8 {
        let (stream, dice, written) =
            (format!("writer-{writer}"), dice.fork(), Arc::clone(&written));
        match writer % 2 {
            0 => writers.spawn(write_by_sql(world.connection().await, stream, dice, written)),
            _ => writers.spawn(write_by_append(world.store.clone(), stream, dice, written)),
        };
    }
    eventually("half of the events are written", async || {
        written.events.load(Ordering::SeqCst) > TRANSACTIONS * 16
    })
    .await;
    assert!(!writers.is_empty());
    assert!(world.boot(&registry).await.is_released());
    while let Some(ended) = writers.join_next().await {
        ended.expect("no writer fails");
    }
    world.append(1).await;
    let last = world.last_position().await;
    for tally in &tallies {
        eventually("the projector is at the end", async || {
            world.position(tally.name()).await == last
        })
        .await;
        world.assert_complete(tally).await;
    }
    stop.store(true, Ordering::SeqCst);
    assert!(watching.await.expect("the mark never falls") > 5, "the mark rose too seldom");
    playing.stop().await;

    assert_eq!(world.high_water().await, last);
    let rollbacks = written.rollbacks.load(Ordering::SeqCst);
    let filled = world.fillers().await.len() as u64;
    assert!(rollbacks > 10 && filled > rollbacks / 2, "{rollbacks} rollbacks, {filled} fillers");
    let events = written.events.load(Ordering::SeqCst) + 1;
    assert_eq!(
        world.number("select count(*) from events where event_type not like '$%'").await,
        events
    );
}

/// A transaction stays open during the whole replay and commits afterwards.
#[tokio::test]
async fn boot_hands_over_below_an_open_transaction_and_play_applies_it_later() {
    let world = World::new().await;
    let (gate, tally) = (Gate::new(), Tally::new("tally"));
    let registry = registry_of([gated(&tally, 50, &gate)]);
    world.append(100).await;
    let booting = async {
        assert!(world.boot(&registry).await.is_released());
    };
    let writing = async {
        gate.arrival().await;
        let mut slow = world.connection().await;
        execute(&mut slow, "begin").await;
        write(&mut slow, "slow", 1).await.expect("the event is written");
        world.append(100).await;
        gate.open();
        slow
    };
    let ((), mut slow) = tokio::join!(booting, writing);
    assert_eq!((world.status("tally").await, world.position("tally").await), ("live".into(), 100));
    execute(&mut slow, "commit").await;
    world.play_until_idle(&registry).await;
    assert_eq!(world.positions("stream_id = 'slow'").await, [101]);
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn an_append_whose_commit_was_not_acknowledged_is_stored_once() {
    let world = World::new().await;
    let cuts = RandomCuts::new(50, seed());
    let cutting = Arc::clone(&cuts);
    let url = world.database_url_through_proxy(move |bytes| cutting.decide(bytes)).await;
    let database = Database::connect(&url, 4, TIMEOUT).await.expect("the server answers");
    let store = EventStore::new(&database);
    let mut expected = 0;
    for round in 0..20 {
        // With and without the expected stream version.
        let given = round % 2 == 0;
        let events: Vec<NewEvent> = (1..=3)
            .map(|n| NewEvent {
                stream_id: "one".into(),
                stream_version: given.then_some(expected + n),
                ..event(0)
            })
            .collect();
        let appended = store.append(&events).await;
        let appended = appended.unwrap_or_else(|error| panic!("round {round}: {error}"));
        expected += 3;
        assert_eq!((appended.events, appended.last.get()), (3, world.last_position().await));
        assert_eq!(
            world.number("select count(*) from events where stream_id = 'one'").await,
            expected,
            "round {round}"
        );
    }
    let (before, after) = cuts.counts();
    assert!(
        before > 1 && after > 1,
        "connections closed: {before} before, {after} after the commit"
    );
}

/// On MySQL, a writer at repeatable read that gets error 1062 and continues keeps a lock that
/// blocks other writers. `append` does not.
#[tokio::test]
async fn a_refused_append_leaves_no_transaction_open_and_does_not_block_the_mark() {
    let world = World::new().await;
    let id = |id: &str| NewEvent { event_id: Some(id.into()), ..event(0) };
    let mut other = world.connection().await;
    execute(&mut other, "set session innodb_lock_wait_timeout = 1").await;
    for round in 0..20 {
        let taken = format!("taken-{round}");
        world.store.append(&[id(&taken)]).await.expect("the event is appended");
        let refused =
            world.store.append(&[event(1), id(&taken)]).await.expect_err("the id is taken");
        assert!(matches!(refused, AppendError::DuplicateEventId { .. }), "{refused}");
        // The locks of the append are released at once: on the row with the same id, and on the end
        // of the log.
        execute(
            &mut other,
            &format!("select position from events where event_id = '{taken}' for update nowait"),
        )
        .await;
        write(&mut other, "other", round + 1).await.expect("no lock blocks the writer");
        let wrong = NewEvent { stream_version: Some(99), ..event(1) };
        let refused = world.store.append(&[wrong]).await.expect_err("not the next version");
        assert!(matches!(refused, AppendError::WrongVersion { .. }), "{refused}");
    }
    let open = "select count(*) from information_schema.innodb_trx t \
                join information_schema.processlist p \
                on p.id = t.trx_mysql_thread_id where p.db = database()";
    // The server refreshes that table only when it has not been read for 0.1 s.
    eventually("no transaction is open", async || {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        world.number(open).await == 0
    })
    .await;
}
