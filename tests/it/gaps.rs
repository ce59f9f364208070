//! Gaps in the log. The gap of a rollback is filled automatically; an unexplained gap is filled
//! only on request. A writer whose position was filled gets an error.

use std::time::Duration;

use projectionist::sqlx::MySqlConnection;
use projectionist::{Limits, NewEvent, Registry, boot};

use crate::support::{
    RunningProcess, TIMEOUT, Tally, World, event, execute, registry, server_error, write,
};

#[tokio::test]
async fn a_rollback_leaves_a_gap_filler_that_no_projector_sees() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.append(9).await;
    world.boot(&registry).await;
    let mut writer = world.connection().await;
    execute(&mut writer, "begin").await;
    for version in 1..=3 {
        write(&mut writer, "taken back", version).await.expect("the event is written");
    }
    execute(&mut writer, "rollback").await;
    world.append(1).await;
    assert_eq!(world.positions("position > 9").await, [13], "the rollback has left gaps");

    world.play_until_idle(&registry).await;
    assert_eq!(world.fillers().await, [10, 11, 12]);
    assert_eq!(world.high_water().await, 13);
    world.assert_complete(&tally).await;
}

/// A writer gets its position, and inserts only after that position was filled. `insert_id` sets
/// the position that the server would use.
#[tokio::test]
async fn a_writer_after_the_fill_gets_an_error_and_its_retry_succeeds() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.append(9).await;
    let mut late = world.connection().await;
    execute(&mut late, "begin").await;
    write(&mut late, "late", 1).await.expect("the event is written");
    execute(&mut late, "rollback").await;
    world.append(1).await;
    world.boot(&registry).await;
    assert_eq!(world.fillers().await, [10]);

    execute(&mut late, "set insert_id = 10").await;
    let refused = write(&mut late, "late", 1).await.expect_err("the position is taken");
    let (number, message) = server_error(&refused);
    assert!(number == 1062 && message.contains("PRIMARY"), "{number} {message}");
    write(&mut late, "late", 1).await.expect("the event is written");

    world.play_until_idle(&registry).await;
    assert_eq!(world.positions("stream_id = 'late'").await, [12]);
    world.assert_complete(&tally).await;
}

/// What a writer does after it has got the position for which it waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriterOutcome {
    Commits,
    RollsBack,
    /// The transaction stays open until the relay has ended, and then commits.
    StaysOpen,
}

/// The relay and the writer wait for the same locked gap. When the lock is released, either may get
/// it.
#[tokio::test]
async fn a_fill_and_a_writer_never_both_get_the_same_position() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.append(9).await;
    world.boot(&registry).await;
    let (mut written, mut filled) = (Vec::new(), Vec::new());
    for then in [WriterOutcome::Commits, WriterOutcome::RollsBack, WriterOutcome::StaysOpen] {
        for relay_first in [false, true, false, true] {
            let (gap, winner) = race(&world, then, relay_first).await;
            eprintln!(
                "{gap}: {then:?}, {}: {winner:?}",
                if relay_first { "relay first" } else { "writer first" }
            );
            match winner {
                Winner::Writer if then != WriterOutcome::RollsBack => written.push(gap),
                Winner::Writer | Winner::Fill => filled.push(gap),
            }
        }
    }
    world.play_until_idle(&registry).await;
    assert_eq!(world.fillers().await, filled);
    let streams: Vec<u64> = world.positions("stream_id like 'raced-%'").await;
    assert_eq!(
        written.iter().filter(|position| !streams.contains(position)).count(),
        0,
        "{written:?} of {streams:?}"
    );
    world.assert_complete(&tally).await;
}

/// Which of the two got the position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Winner {
    Writer,
    Fill,
}

/// Locks a gap, makes a relay and a writer wait for it in the given order, and releases the lock.
/// Asserts that the mark never passes an undecided position. A writer that does not get the
/// position gets an error, and its next attempt succeeds.
async fn race(world: &World, then: WriterOutcome, relay_first: bool) -> (u64, Winner) {
    let gap = world.last_position().await + 1;
    let ahead = gap + 1;
    world
        .execute(&format!(
            "insert into events (position, stream_id, stream_version, event_type, payload) \
             values ({ahead}, 'ahead-{ahead}', 1, 'Opened', '{{}}')"
        ))
        .await;
    // A gap lock locks no row, so the relay's probe finds no writer. An insert waits for the lock.
    let mut holder = world.connection().await;
    execute(&mut holder, "set session transaction isolation level repeatable read").await;
    execute(&mut holder, "begin").await;
    execute(&mut holder, &format!("select position from events where position = {gap} for update"))
        .await;

    let stream = format!("raced-{gap}");
    let mut writer = world.connection().await;
    execute(&mut writer, &format!("set insert_id = {gap}")).await;
    execute(&mut writer, "begin").await;
    let start_writer = |mut writer: MySqlConnection, stream: String| {
        tokio::spawn(async move {
            let written = write(&mut writer, &stream, 1).await;
            (writer, written)
        })
    };
    let (mut relay, writing) = if relay_first {
        let mut relay = world.start(&["relay", "--once"]);
        wait_for_lock_waits(world, 1, &mut relay).await;
        (relay, start_writer(writer, stream.clone()))
    } else {
        let writing = start_writer(writer, stream.clone());
        (world.start(&["relay", "--once"]), writing)
    };
    wait_for_lock_waits(world, 2, &mut relay).await;
    execute(&mut holder, "rollback").await;

    let ended = tokio::time::timeout(TIMEOUT, writing).await.expect("the writer stops waiting");
    let (mut writer, written) = ended.expect("the task does not panic");
    let had = match &written {
        Ok(()) => Winner::Writer,
        Err(error) => {
            let (number, message) = server_error(error);
            assert!(number == 1062 && message.contains("PRIMARY"), "{number} {message}");
            Winner::Fill
        }
    };
    match (had, then) {
        (Winner::Writer, WriterOutcome::StaysOpen) => {
            relay.finish().await.exits(0);
            assert_eq!(
                world.high_water().await,
                gap - 1,
                "the mark must not pass an undecided position"
            );
            execute(&mut writer, "commit").await;
        }
        (_, WriterOutcome::StaysOpen | WriterOutcome::Commits) => {
            if had == Winner::Fill {
                write(&mut writer, &stream, 1)
                    .await
                    .expect("the event is written at a new position");
            }
            execute(&mut writer, "commit").await;
            relay.finish().await.exits(0);
        }
        (_, WriterOutcome::RollsBack) => {
            execute(&mut writer, "rollback").await;
            relay.finish().await.exits(0);
        }
    }
    // All positions are decided now.
    world.run(&["relay", "--once"]).await.exits(0);
    assert_eq!(world.high_water().await, world.last_position().await);
    let is_lost = then != WriterOutcome::RollsBack
        && world.positions(&format!("stream_id = '{stream}'")).await.len() != 1;
    assert!(!is_lost, "{stream} is not in the log exactly once");
    (gap, had)
}

/// Waits until `count` transactions wait for a lock, or until the relay has ended.
async fn wait_for_lock_waits(world: &World, count: usize, relay: &mut RunningProcess) {
    while world.lock_waits().await < count && relay.is_running() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn an_append_after_the_fill_retries_by_itself() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.append(9).await;
    world
        .execute(
            "insert into events (position, stream_id, stream_version, event_type, payload) \
             values (11, 'ahead', 1, 'Opened', '{}')",
        )
        .await;
    world.boot(&registry).await;
    assert_eq!(world.fillers().await, [10]);
    // The first row that a session writes into this stream gets the filled position.
    world
        .execute(
            "create trigger late before insert on events for each row begin \
             if new.stream_id = 'late' and @came_late is null then set @came_late = 1, \
             new.position = 10; end if; end",
        )
        .await;

    let late =
        |version| NewEvent { stream_id: "late".into(), stream_version: Some(version), ..event(0) };
    let appended = world.store.append(&[late(1), late(2)]).await.expect("the events are appended");
    assert_eq!(appended.events, 2);
    let written = world.positions("stream_id = 'late'").await;
    assert!(
        written.len() == 2 && written[0] > 11 && written[1] == appended.last.get(),
        "{written:?}"
    );
    world.play_until_idle(&registry).await;
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn an_unexplained_gap_blocks_the_mark_until_it_is_filled_on_demand() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.append(9).await;
    world.execute("alter table events auto_increment = 70020").await;
    world.append(2).await;
    assert_eq!(world.positions("position > 9").await, [70020, 70021]);

    let published = world.run(&["relay", "--once"]).await.exits(0);
    assert!(published.stdout.contains("up to position 9"), "{}", published.stdout);
    assert!(published.stderr.contains("high_water_blocked"), "{}", published.stderr);
    assert!(published.stderr.contains("projectionist fill 10 70019"), "{}", published.stderr);
    let limits = Limits::default().with_retry_timeout(Some(Duration::ZERO));
    let booted = boot(&world.database, &registry, limits, |_| {}).await.expect("boot succeeds");
    assert!(
        !booted.is_released() && booted.explain().contains("projectionist fill 10 70019"),
        "{}",
        booted.explain()
    );
    assert_eq!((world.position("tally").await, world.high_water().await), (9, 9));
    assert!(world.fillers().await.is_empty());

    world.run(&["fill", "10", "70019", "--yes"]).await.exits(0);
    // A boot reads the many fillers in large batches. Playing them from the test's queue would be
    // slow.
    let late = Tally::new("late");
    let registry = Registry::new().with(late.clone()).expect("the name is unique");
    let booted =
        boot(&world.database, &registry, Limits::default(), |_| {}).await.expect("boot succeeds");
    assert!(booted.is_released());
    assert_eq!(world.fillers().await.len(), 70_010);
    assert_eq!(world.high_water().await, 70_021);
    assert_eq!(late.applied(&world).await, (1..=9).chain(70_020..=70_021).collect::<Vec<_>>());
}

/// The server's global setting is checked at the start. A session's setting cannot be checked, and
/// only causes fillers.
#[tokio::test]
async fn a_writer_that_skips_positions_does_not_delay_others() {
    let world = World::new().await;
    let tally = Tally::new("tally").only(&["Closed"]);
    let registry = registry(&[&tally]);
    let mut stepping = world.connection().await;
    execute(&mut stepping, "set session auto_increment_increment = 7").await;
    // There are more missing positions in total than a single gap may have to be filled
    // automatically.
    execute(
        &mut stepping,
        "insert into events (stream_id, stream_version, event_type, payload) \
         with recursive n as (select 1 as n union all select n + 1 from n where n < 1000), \
         m as (select 1 as m union all select m + 1 from m where m < 12) \
         select concat('stepping-', m), n, if(n < 10, 'Closed', 'Opened'), '{}' from m join n",
    )
    .await;
    let last = world.last_position().await;
    assert!(last > 7 * 11_000, "{last}");

    let published = world.run(&["relay", "--once"]).await.exits(0);
    assert!(!published.stderr.contains("high_water_blocked"), "{}", published.stderr);
    assert_eq!(world.high_water().await, last);
    let booted =
        boot(&world.database, &registry, Limits::default(), |_| {}).await.expect("boot succeeds");
    assert!(booted.is_released());
    world.assert_complete(&tally).await;
}

/// A range with deleted rows has fewer rows than positions. Reading as many rows as the range has
/// positions would read beyond it.
#[tokio::test]
async fn a_replay_over_deleted_events_does_not_read_past_the_mark() {
    let world = World::new().await;
    world.append(100).await;
    world.boot(&registry(&[&Tally::new("before")])).await;
    world.execute("delete from events where position between 20 and 80").await;
    let mut writer = world.connection().await;
    execute(&mut writer, "begin").await;
    write(&mut writer, "in flight", 1).await.expect("the event is written");
    world.append(50).await;

    let tally = Tally::new("after");
    let limits = Limits::default().with_batch(10).with_retry_timeout(Some(Duration::from_secs(1)));
    let booted =
        boot(&world.database, &registry(&[&tally]), limits, |_| {}).await.expect("boot succeeds");
    assert!(!booted.is_released(), "events above the open transaction are visible");
    assert_eq!((world.high_water().await, world.position("after").await), (100, 100));
    world.assert_folded(&tally).await;

    execute(&mut writer, "commit").await;
    assert!(world.boot(&registry(&[&tally])).await.is_released());
    world.play_until_idle(&registry(&[&tally])).await;
    world.assert_complete(&tally).await;
}

/// A user's row with the fillers' stream id must not prevent filling. It did so once.
#[tokio::test]
async fn a_row_that_looks_like_a_filler_does_not_prevent_filling() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    world.append(9).await;
    world
        .execute(
            "insert into events (position, stream_id, stream_version, event_type, payload) \
             values (11, '$filler', 10, 'Opened', '1')",
        )
        .await;
    world.boot(&registry(&[&tally])).await;
    assert_eq!((world.high_water().await, world.fillers().await), (11, vec![10]));
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn fill_counts_filled_and_taken_positions_and_refuses_those_below_the_mark() {
    let world = World::new().await;
    world.append(9).await;
    world.run(&["relay", "--once"]).await.exits(0);
    for ahead in [12, 70_020] {
        world
            .execute(&format!(
                "insert into events (position, stream_id, stream_version, event_type, payload) \
                 values ({ahead}, 'ahead', {ahead}, 'Opened', '1')"
            ))
            .await;
    }
    world.execute("delete from events where position = 7").await;
    let refused = world.run(&["fill", "7", "11", "--yes"]).await.exits(2);
    refused.prints(&["up to the high-water mark, 9, cannot be filled", "audit"]);
    assert!(world.fillers().await.is_empty());
    let filled = world.run(&["fill", "10", "70019", "--yes"]).await.exits(0);
    assert_eq!(filled.stdout, "filled 70,009 positions from 10 to 70019; 1 had a row already\n");
    let filled = world.run(&["fill", "10", "12", "--yes"]).await.exits(0);
    assert_eq!(filled.stdout, "nothing to fill: each position from 10 to 12 has a row\n");
}

/// `insert ignore` also drops a row that a trigger or a constraint rejects. Only the row count
/// shows it.
#[tokio::test]
async fn a_filler_that_the_server_drops_is_an_error() {
    let world = World::new().await;
    world.append(9).await;
    world
        .execute("alter table events add constraint no_fillers check (event_type not like '$%')")
        .await;
    world
        .execute(
            "insert into events (position, stream_id, stream_version, event_type, payload) \
             values (12, 'ahead', 1, 'Opened', '1')",
        )
        .await;
    world
        .run(&["fill", "10", "11", "--yes"])
        .await
        .exits(2)
        .prints(&["position 10 cannot be filled"]);
    let relayed = world.run(&["relay", "--once"]).await.exits(2);
    relayed.prints(&["position 10 cannot be filled", "constraint"]);
    assert_eq!(world.high_water().await, 9);
}
