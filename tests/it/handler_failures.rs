//! A failing projector breaks alone. Transient errors break no projector.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use projectionist::sqlx::{self, MySqlConnection};
use projectionist::{
    BackgroundLimits, Database, Event, Limits, NewEvent, Projector, Queue, Registry, async_trait,
    boot,
};

use crate::support::{
    Gate, ScriptedProjector, Session, TIMEOUT, Tally, World, eventually, execute, registry,
    registry_of, run, scripted_at,
};

/// Stores the server's error number if a handler's statement failed, and returns the result
/// unchanged.
fn record_error_number(error_number: &AtomicU64, result: anyhow::Result<()>) -> anyhow::Result<()> {
    if let Err(error) = &result
        && let Some(sqlx::Error::Database(error)) = error.downcast_ref()
    {
        error_number.store(
            error.downcast_ref::<sqlx::mysql::MySqlDatabaseError>().number().into(),
            Ordering::SeqCst,
        );
    }
    result
}

// Errors of one projector.

/// The position at which the faulty projector fails: in the middle of a batch, after the boot.
const POISON: u64 = 45;

/// Plays three projectors, of which the second fails at [`POISON`]. Asserts that the others are not
/// affected.
async fn assert_fails_alone(
    fault: impl Fn(&Tally) -> ScriptedProjector,
    because: &str,
) -> (World, Tally) {
    assert_fails_alone_with(BackgroundLimits::default(), fault, because).await
}

async fn assert_fails_alone_with(
    background_after: BackgroundLimits,
    fault: impl Fn(&Tally) -> ScriptedProjector,
    because: &str,
) -> (World, Tally) {
    let world = World::new().await;
    let (before, faulty, after) =
        (Tally::new("earlier"), Tally::new("faulty"), Tally::new("later"));
    let registry = Registry::new().with(before.clone()).and_then(|set| set.with(fault(&faulty)));
    let registry = registry.and_then(|set| set.with(after.clone())).expect("the names are unique");
    world.append(30).await;
    assert!(world.boot(&registry).await.is_released());
    world.append(30).await;
    let limits = World::play_settings().limits.with_handler_timeout(Duration::from_millis(500));
    let settings =
        World::play_settings().with_limits(limits).with_background_after(background_after);
    let played =
        world.play_with(Arc::clone(&world.queue) as Arc<dyn Queue>, &registry, settings).await;

    assert_eq!(played.broken, 1);
    world.assert_broken("faulty", POISON, because).await;
    world.assert_complete(&before).await;
    world.assert_complete(&after).await;
    // The row is not locked, so a boot of the repaired projector does not wait.
    world.execute("select 1 from projectors where name = 'faulty' for update nowait").await;
    (world, faulty)
}

#[tokio::test]
async fn an_error_breaks_only_its_projector_and_its_writes_are_rolled_back() {
    let fault =
        |tally: &Tally| scripted_at(tally, POISON, |_| Box::pin(async { anyhow::bail!("poison") }));
    let (world, faulty) = assert_fails_alone(fault, "poison").await;
    world.assert_folded(&faulty).await;
}

#[tokio::test]
async fn an_sql_error_breaks_only_its_projector() {
    let fault = |tally: &Tally| {
        scripted_at(tally, POISON, |db| {
            Box::pin(run(db, "update faulty set no_such_column = 1 where position = 1"))
        })
    };
    let (world, faulty) = assert_fails_alone(fault, "no_such_column").await;
    world.assert_folded(&faulty).await;
}

#[tokio::test]
async fn a_panic_breaks_only_its_projector() {
    let fault =
        |tally: &Tally| scripted_at(tally, POISON, |_| Box::pin(async { panic!("at the poison") }));
    let (world, faulty) = assert_fails_alone(fault, "panicked: at the poison").await;
    world.assert_folded(&faulty).await;
}

#[tokio::test]
async fn an_endless_handler_breaks_only_its_projector() {
    let fault = |tally: &Tally| scripted_at(tally, POISON, |_| Box::pin(std::future::pending()));
    let because = "the handler of faulty@1 took longer than 0.5 s for event 45 (Closed). If it needs \
                   more time, raise --handler-timeout";
    let (world, faulty) = assert_fails_alone(fault, because).await;
    world.assert_folded(&faulty).await;
}

#[tokio::test]
async fn an_endless_statement_breaks_only_its_projector_and_is_killed() {
    let began = Instant::now();
    let fault =
        |tally: &Tally| scripted_at(tally, POISON, |db| Box::pin(run(db, "select sleep(1000)")));
    let (world, faulty) = assert_fails_alone(fault, "took longer than").await;
    assert!(began.elapsed() < TIMEOUT);
    world.assert_folded(&faulty).await;
    let sleeps = |session: &Session| session.statement == "select sleep(1000)";
    eventually("the server has ended the statement", async || {
        !world.sessions().await.iter().any(sleeps)
    })
    .await;
}

#[tokio::test]
async fn an_endless_statement_moved_to_the_background_breaks_only_its_projector() {
    let fault =
        |tally: &Tally| scripted_at(tally, POISON, |db| Box::pin(run(db, "select sleep(1000)")));
    // The projector is moved to the background before the handler's own timeout expires.
    let background_after = BackgroundLimits::default().with_time(Duration::from_millis(100));
    let (world, faulty) =
        assert_fails_alone_with(background_after, fault, "took longer than").await;
    world.assert_folded(&faulty).await;
}

/// Plays a projector whose handler ends the transaction at [`POISON`]. Asserts that no event is
/// applied twice, that the projector is broken, and that a boot does not release it.
async fn assert_commit_breaks(statement: &'static str) {
    let world = World::new().await;
    let (faulty, other) = (Tally::new("faulty"), Tally::new("other"));
    let registry =
        Registry::new().with(scripted_at(&faulty, POISON, move |db| Box::pin(run(db, statement))));
    let registry = registry.and_then(|set| set.with(other.clone())).expect("the names are unique");
    world.append(30).await;
    assert!(world.boot(&registry).await.is_released());
    world.append(30).await;
    assert_eq!(world.play_until_idle(&registry).await.broken, 1);
    world.assert_complete(&other).await;
    assert_must_be_rebuilt(&world, &faulty).await;
    let repaired = crate::support::registry(&[&faulty, &other]);
    assert!(!world.boot(&repaired).await.is_released());
    assert_must_be_rebuilt(&world, &faulty).await;
    // The projector must be rebuilt.
    world.execute("drop table faulty").await;
    world.execute("delete from projectors where name = 'faulty'").await;
    assert!(world.boot(&repaired).await.is_released());
    world.assert_complete(&faulty).await;
}

/// Asserts that a projector is broken because its handler committed part of a batch, and that no
/// event was applied twice.
async fn assert_must_be_rebuilt(world: &World, tally: &Tally) {
    let entry = world.entry(tally.name()).await.expect("the projector is in the ledger");
    let failure = entry.status.failure().expect("the projector is broken");
    for words in ["the handler committed the transaction", "rebuild"] {
        assert!(failure.error.contains(words), "{failure:?}");
    }
    assert!(entry.rebuild_reason.is_some() && entry.position.get() < POISON, "{entry:?}");
    let applied = tally.applied(world).await;
    assert_eq!(applied, (1..=applied.len() as u64).collect::<Vec<_>>());
    assert!(applied.len() as u64 >= POISON, "the committed rows are missing");
}

#[tokio::test]
async fn an_implicit_commit_breaks_its_projector_and_nothing_is_applied_twice() {
    assert_commit_breaks("create table if not exists made_by_a_handler (id int primary key)").await;
}

#[tokio::test]
async fn a_handler_that_commits_breaks_its_projector_and_nothing_is_applied_twice() {
    assert_commit_breaks("commit").await;
}

#[tokio::test]
async fn a_handler_that_rolls_back_breaks_only_its_projector() {
    let fault = |tally: &Tally| scripted_at(tally, POISON, |db| Box::pin(run(db, "rollback")));
    assert_fails_alone(fault, "the transaction").await;
}

/// The driver reports the error before it sends anything, and then waits for an answer that never
/// comes.
fn binding_too_many_values(tally: &Tally) -> ScriptedProjector {
    scripted_at(tally, POISON, |db| {
        Box::pin(async move {
            sqlx::query("select ?").bind(1).bind(2).execute(db).await?;
            Ok(())
        })
    })
}

#[tokio::test]
async fn a_statement_with_too_many_values_breaks_only_its_projector() {
    assert_fails_alone(binding_too_many_values, "expected 1 parameters").await;
}

#[tokio::test]
async fn a_statement_with_too_many_values_in_boot_breaks_it_and_stalls_the_others() {
    assert_eq!(
        assert_fails_in_boot(binding_too_many_values, "expected 1 parameters").await,
        positions_before_poison()
    );
}

#[tokio::test]
async fn an_error_between_unsubscribed_events_leaves_the_position_just_before_it() {
    let world = World::new().await;
    // Every third event is subscribed. The handler fails at 45 in play and at 15 in boot.
    for (poison, appended) in [(45, 0), (15, 60)] {
        let tally = Tally::new(&format!("tally_{poison}")).only(&["Closed"]).failing_at(poison);
        let registry = registry(&[&tally]);
        world.append(appended).await;
        world.boot(&registry).await;
        world.append(60 - appended).await;
        world.play_until_idle(&registry).await;
        world.assert_broken(tally.name(), poison, "is poison").await;
        assert_eq!(tally.applied(&world).await, (1..poison / 3).map(|n| n * 3).collect::<Vec<_>>());
    }
}

/// Boots three projectors, of which the second fails at [`POISON`]. Asserts that the others stall,
/// that no lock is held, and that a boot of the repaired projector brings all to the end. Returns
/// the positions that the failing projector had applied.
async fn assert_fails_in_boot(
    fault: impl Fn(&Tally) -> ScriptedProjector,
    because: &str,
) -> Vec<u64> {
    let world = World::new().await;
    let (before, faulty, after) =
        (Tally::new("earlier"), Tally::new("faulty"), Tally::new("later"));
    let registry = Registry::new().with(before.clone()).and_then(|set| set.with(fault(&faulty)));
    let registry = registry.and_then(|set| set.with(after.clone())).expect("the names are unique");
    world.append(60).await;
    let limits = Limits::default().with_handler_timeout(Duration::from_millis(500)).with_batch(100);
    let report = boot(&world.database, &registry, limits, |_| {}).await.expect("boot succeeds");

    let broken: Vec<&str> = report.broken().map(|booted| booted.id.name.as_str()).collect();
    assert_eq!((report.is_released(), broken), (false, vec!["faulty"]));
    world.assert_broken("faulty", POISON, because).await;
    for tally in [&before, &after] {
        assert_eq!(world.status(tally.name()).await, "stalled");
        world.assert_folded(tally).await;
    }
    world.execute("select 1 from projectors where name = 'faulty' for update nowait").await;
    let applied = faulty.applied(&world).await;

    assert!(world.boot(&crate::support::registry(&[&before, &faulty, &after])).await.is_released());
    world.assert_complete(&before).await;
    world.assert_complete(&after).await;
    assert_eq!(world.position("faulty").await, 60);
    applied
}

/// The positions before the failing one, each once.
fn positions_before_poison() -> Vec<u64> {
    (1..POISON).collect()
}

#[tokio::test]
async fn a_panic_in_boot_breaks_its_projector_and_stalls_the_others() {
    let fault =
        |tally: &Tally| scripted_at(tally, POISON, |_| Box::pin(async { panic!("at the poison") }));
    assert_eq!(
        assert_fails_in_boot(fault, "panicked: at the poison").await,
        positions_before_poison()
    );
}

#[tokio::test]
async fn an_endless_handler_in_boot_breaks_its_projector_and_stalls_the_others() {
    let fault = |tally: &Tally| scripted_at(tally, POISON, |_| Box::pin(std::future::pending()));
    assert_eq!(assert_fails_in_boot(fault, "took longer than").await, positions_before_poison());
}

#[tokio::test]
async fn an_endless_statement_in_boot_breaks_its_projector_and_stalls_the_others() {
    let fault =
        |tally: &Tally| scripted_at(tally, POISON, |db| Box::pin(run(db, "select sleep(1000)")));
    assert_eq!(assert_fails_in_boot(fault, "took longer than").await, positions_before_poison());
}

#[tokio::test]
async fn a_handler_that_commits_in_boot_breaks_its_projector_and_nothing_is_applied_twice() {
    for statement in ["commit", "create table if not exists made_by_a_handler (id int primary key)"]
    {
        let world = World::new().await;
        let (faulty, other) = (Tally::new("faulty"), Tally::new("other"));
        let registry = Registry::new()
            .with(scripted_at(&faulty, POISON, move |db| Box::pin(run(db, statement))));
        let registry =
            registry.and_then(|set| set.with(other.clone())).expect("the names are unique");
        world.append(60).await;
        assert!(!world.boot(&registry).await.is_released());
        assert_must_be_rebuilt(&world, &faulty).await;
        assert_eq!(world.status("other").await, "stalled");
        world.boot(&crate::support::registry(&[&faulty, &other])).await;
        assert_must_be_rebuilt(&world, &faulty).await;
    }
}

/// One byte over the limit, the server reports an error. Far over it, the server closes the
/// connection while the statement is being sent.
#[tokio::test]
async fn a_statement_over_max_allowed_packet_breaks_only_its_projector() {
    for (beyond, because) in
        [(1, "max_allowed_packet"), (32 << 20, "closed the handler's connection 10 times in a row")]
    {
        let world = World::new().await;
        // The failing projector subscribes to a single event, so its batch cannot be split.
        let (faulty, other) = (Tally::new("faulty").only(&["Closed"]), Tally::new("other"));
        let large = scripted_at(&faulty, 3, move |db| {
            Box::pin(async move {
                let most: u64 = sqlx::query_scalar("select cast(@@max_allowed_packet as unsigned)")
                    .fetch_one(&mut *db)
                    .await?;
                let text = "x".repeat(most as usize + beyond);
                sqlx::query("select length(?)").bind(text).execute(db).await?;
                Ok(())
            })
        });
        let registry = Registry::new()
            .with(large)
            .and_then(|set| set.with(other.clone()))
            .expect("the names are unique");
        world.boot(&registry).await;
        world.append(5).await;
        let playing = world.start_play(&registry);
        eventually("the other projector is at the end", async || {
            world.position("other").await == 5
        })
        .await;
        eventually("the faulty projector is broken", async || {
            world.status("faulty").await == "broken"
        })
        .await;
        assert_eq!(playing.stop().await.broken, 1);
        world.assert_broken("faulty", 3, because).await;
        world.assert_folded(&faulty).await;
        world.assert_complete(&other).await;
    }
}

/// A projector whose setup fails until `is_fixed` is set.
struct BadSetup {
    tally: Tally,
    is_fixed: Arc<AtomicBool>,
}

#[async_trait]
impl Projector for BadSetup {
    fn name(&self) -> &str {
        self.tally.name()
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        anyhow::ensure!(self.is_fixed.load(Ordering::SeqCst), "no such tablespace");
        self.tally.setup(db).await
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.tally.handle(event, db).await
    }
}

#[tokio::test]
async fn a_failing_setup_breaks_its_projector_before_any_event_and_can_be_fixed() {
    let world = World::new().await;
    let (first, bad, last) = (Tally::new("first"), Tally::new("bad"), Tally::new("last"));
    let is_fixed = Arc::new(AtomicBool::new(false));
    let bad_setup = BadSetup { tally: bad.clone(), is_fixed: Arc::clone(&is_fixed) };
    let registry = Registry::new().with(first.clone()).and_then(|set| set.with(bad_setup));
    let registry = registry.and_then(|set| set.with(last.clone())).expect("the names are unique");
    world.append(10).await;
    assert!(!world.boot(&registry).await.is_released());
    let entry = world.entry("bad").await.expect("the projector is in the ledger");
    let failure = entry.status.failure().expect("the projector is broken");
    assert!(failure.event.is_none() && failure.error.contains("no such tablespace"), "{failure:?}");
    for name in ["first", "last"] {
        assert_eq!((world.status(name).await, world.position(name).await), ("stalled".into(), 0));
    }
    is_fixed.store(true, Ordering::SeqCst);
    assert!(world.boot(&registry).await.is_released());
    for tally in [&first, &bad, &last] {
        world.assert_complete(tally).await;
    }
}

#[tokio::test]
async fn a_boot_after_a_failure_resumes_and_applies_no_event_twice() {
    let world = World::new().await;
    let is_fixed = Arc::new(AtomicBool::new(false));
    let shown: Vec<Arc<AtomicU64>> = (0..3).map(|_| Arc::default()).collect();
    let tallies: Vec<Tally> = (0..3)
        .map(|n| {
            let (is_fixed, shown) = (Arc::clone(&is_fixed), Arc::clone(&shown[n]));
            Tally::new(["first", "poisoned", "last"][n]).hook(move |event| {
                let is_poison =
                    n == 1 && event.position().get() == 250 && !is_fixed.load(Ordering::SeqCst);
                anyhow::ensure!(!is_poison, "poison");
                shown.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })
        })
        .collect();
    let registry = registry(&[&tallies[0], &tallies[1], &tallies[2]]);
    world.append(600).await;
    assert!(!world.boot(&registry).await.is_released());
    world.assert_broken("poisoned", 250, "poison").await;
    for (tally, name) in [(&tallies[0], "first"), (&tallies[2], "last")] {
        assert_eq!(world.status(name).await, "stalled");
        assert!(
            (200..600).contains(&world.position(name).await),
            "the projector stops when the other one fails"
        );
        world.assert_folded(tally).await;
    }
    is_fixed.store(true, Ordering::SeqCst);
    for count in &shown {
        count.store(0, Ordering::SeqCst);
    }
    let resumed_at: Vec<u64> =
        [world.position("first").await, 249, world.position("last").await].into();
    assert!(world.boot(&registry).await.is_released());
    for n in 0..3 {
        assert_eq!(
            shown[n].load(Ordering::SeqCst),
            600 - resumed_at[n],
            "{} did not continue from its position",
            tallies[n].name()
        );
        world.assert_complete(&tallies[n]).await;
    }
}

// Transient errors.

/// The limits of the boot command, which retries transient errors for a limited time.
fn boot_limits() -> Limits {
    Limits::default().with_batch(100).with_retry_timeout(Some(TIMEOUT))
}

/// Creates two rows that two transactions can lock.
async fn create_pair(world: &World) {
    world.execute("create table pair (id int primary key, n int not null)").await;
    world.execute("insert into pair values (1, 0), (2, 0)").await;
}

/// Locks one row, waits at the gate, and locks the other.
fn locking_both(tally: &Tally, gate: &Gate, error_number: &Arc<AtomicU64>) -> ScriptedProjector {
    let (at_gate, stored) = (gate.clone(), Arc::clone(error_number));
    scripted_at(tally, 5, move |db| {
        let (gate, error_number) = (at_gate.clone(), Arc::clone(&stored));
        Box::pin(async move {
            run(db, "update pair set n = n + 1 where id = 1").await?;
            gate.pass().await;
            record_error_number(
                &error_number,
                run(db, "update pair set n = n + 1 where id = 2").await,
            )
        })
    })
}

/// Like [`locking_both`], but the handler does not return the error.
fn swallowing_deadlocks(
    tally: &Tally,
    gate: &Gate,
    error_number: &Arc<AtomicU64>,
) -> ScriptedProjector {
    let (at_gate, stored) = (gate.clone(), Arc::clone(error_number));
    scripted_at(tally, 5, move |db| {
        let (gate, error_number) = (at_gate.clone(), Arc::clone(&stored));
        Box::pin(async move {
            run(db, "update pair set n = n + 1 where id = 1").await?;
            gate.pass().await;
            let _ = record_error_number(
                &error_number,
                run(db, "update pair set n = n + 1 where id = 2").await,
            );
            Ok(())
        })
    })
}

/// Locks the same rows in the other order while the handler waits at the gate. Then opens the gate,
/// so that the handler loses a deadlock.
async fn provoke_deadlock(world: &World, gate: &Gate) {
    gate.arrival().await;
    let mut other = world.connection().await;
    execute(&mut other, "create table ballast (n int not null)").await;
    execute(&mut other, "begin").await;
    // The server rolls back the transaction that has changed fewer rows, so this one changes many.
    let many = "with recursive n as (select 1 as n union all select n + 1 from n where n < 900) \
                select n from n";
    execute(&mut other, &format!("insert into ballast {many}")).await;
    execute(&mut other, "update pair set n = n + 100 where id = 2").await;
    let other = tokio::spawn(async move {
        execute(&mut other, "update pair set n = n + 100 where id = 1").await;
        execute(&mut other, "commit").await;
    });
    eventually("the other transaction waits for the handler", async || {
        world.lock_waits().await == 1
    })
    .await;
    gate.open();
    other.await.expect("the other transaction commits");
}

#[tokio::test]
async fn a_deadlock_in_a_handler_is_retried_and_breaks_no_projector() {
    let world = World::new().await;
    create_pair(&world).await;
    let (gate, tally, error_number) =
        (Gate::new(), Tally::new("tally"), Arc::new(AtomicU64::new(0)));
    let registry = registry_of([locking_both(&tally, &gate, &error_number)]);
    world.boot(&registry).await;
    world.append(10).await;

    let playing = world.start_play(&registry);
    provoke_deadlock(&world, &gate).await;
    eventually("the projector is at the end", async || world.position("tally").await == 10).await;
    assert_eq!(playing.stop().await.broken, 0);
    assert_eq!(error_number.load(Ordering::SeqCst), 1213, "the handler got the deadlock error");
    assert_eq!(
        world.number("select sum(n) div 1 from pair").await,
        202,
        "each update was applied once"
    );
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_deadlock_in_boot_is_retried_and_breaks_no_projector() {
    let world = World::new().await;
    create_pair(&world).await;
    let (gate, tally, error_number) =
        (Gate::new(), Tally::new("tally"), Arc::new(AtomicU64::new(0)));
    let registry = registry_of([locking_both(&tally, &gate, &error_number)]);
    world.append(10).await;
    let booting = boot(&world.database, &registry, boot_limits(), |_| {});
    let (booted, ()) = tokio::join!(booting, provoke_deadlock(&world, &gate));
    assert!(booted.expect("boot succeeds").is_released());
    assert_eq!(error_number.load(Ordering::SeqCst), 1213, "the handler got the deadlock error");
    assert_eq!(
        world.number("select sum(n) div 1 from pair").await,
        202,
        "each update was applied once"
    );
    world.assert_complete(&tally).await;
}

/// Locks the first row, with a lock timeout of one second.
fn locking_with_short_timeout(tally: &Tally, error_number: &Arc<AtomicU64>) -> ScriptedProjector {
    let stored = Arc::clone(error_number);
    scripted_at(tally, 5, move |db| {
        let error_number = Arc::clone(&stored);
        Box::pin(async move {
            run(db, "set session innodb_lock_wait_timeout = 1").await?;
            record_error_number(
                &error_number,
                run(db, "update pair set n = n + 1 where id = 1").await,
            )
        })
    })
}

#[tokio::test]
async fn a_lock_wait_timeout_in_a_handler_is_retried_and_breaks_no_projector() {
    let world = World::new().await;
    create_pair(&world).await;
    let (tally, error_number) = (Tally::new("tally"), Arc::new(AtomicU64::new(0)));
    let registry = registry_of([locking_with_short_timeout(&tally, &error_number)]);
    world.boot(&registry).await;
    let mut other = world.connection().await;
    execute(&mut other, "begin").await;
    execute(&mut other, "update pair set n = n + 100 where id = 1").await;
    world.append(10).await;
    let playing = world.start_play(&registry);
    eventually("the handler's wait has timed out", async || {
        error_number.load(Ordering::SeqCst) == 1205
    })
    .await;
    assert_eq!(world.status("tally").await, "live");
    execute(&mut other, "commit").await;
    eventually("the projector is at the end", async || world.position("tally").await == 10).await;
    assert_eq!(playing.stop().await.broken, 0);
    assert_eq!(world.number("select n from pair where id = 1").await, 101);
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_lock_wait_timeout_in_boot_is_retried_and_breaks_no_projector() {
    let world = World::new().await;
    create_pair(&world).await;
    let (tally, error_number) = (Tally::new("tally"), Arc::new(AtomicU64::new(0)));
    let registry = registry_of([locking_with_short_timeout(&tally, &error_number)]);
    let mut other = world.connection().await;
    execute(&mut other, "begin").await;
    execute(&mut other, "update pair set n = n + 100 where id = 1").await;
    world.append(10).await;
    let holding = async {
        eventually("the handler's wait has timed out", async || {
            error_number.load(Ordering::SeqCst) == 1205
        })
        .await;
        assert_eq!(world.status("tally").await, "booting");
        assert!(world.position("tally").await < 5, "the event that waits is not passed");
        execute(&mut other, "commit").await;
    };
    let (booted, ()) =
        tokio::join!(boot(&world.database, &registry, boot_limits(), |_| {}), holding);
    assert!(booted.expect("boot succeeds").is_released());
    assert_eq!(world.number("select n from pair where id = 1").await, 101);
    world.assert_complete(&tally).await;
}

// Undecodable events.

#[tokio::test]
async fn an_undecodable_payload_breaks_only_projectors_that_read_it() {
    let world = World::new().await;
    world.append(10).await;
    let garbled = NewEvent::new("case-0", "Amended", r#"{"note":"garbled"}"#);
    world.store.append(&[garbled]).await.expect("the event is stored");
    world.append(10).await;
    let url = world.database_url_with_replaced_text(b"garbled", b"\xffarbled").await;
    let database = Database::connect(&url, 8, TIMEOUT).await.expect("the server answers");

    let indifferent = Tally::new("indifferent");
    let booted = boot(&database, &registry(&[&indifferent]), boot_limits(), |_| {}).await;
    assert!(booted.expect("boot succeeds").is_released());
    world.assert_complete(&indifferent).await;

    // This handler accepts any text.
    let reader = Tally::new("reader").hook(|event| {
        std::hint::black_box(event.payload_text());
        Ok(())
    });
    let booted = boot(&database, &registry(&[&reader]), boot_limits(), |_| {}).await;
    assert!(!booted.expect("boot succeeds").is_released());
    world.assert_broken("reader", 11, "event 11 cannot be decoded").await;
    world.assert_broken("reader", 11, "payload").await;
    world.assert_folded(&reader).await;
}

#[tokio::test]
async fn a_deadlock_swallowed_by_a_handler_is_retried_and_each_event_applied_once() {
    for in_boot in [true, false] {
        let world = World::new().await;
        create_pair(&world).await;
        let (gate, tally, error_number) =
            (Gate::new(), Tally::new("tally"), Arc::new(AtomicU64::new(0)));
        let registry = registry_of([swallowing_deadlocks(&tally, &gate, &error_number)]);
        if in_boot {
            world.append(10).await;
            let booting = boot(&world.database, &registry, boot_limits(), |_| {});
            let (booted, ()) = tokio::join!(booting, provoke_deadlock(&world, &gate));
            assert!(booted.expect("boot succeeds").is_released());
        } else {
            world.boot(&registry).await;
            world.append(10).await;
            let playing = world.start_play(&registry);
            provoke_deadlock(&world, &gate).await;
            eventually("the projector is at the end", async || world.position("tally").await == 10)
                .await;
            assert_eq!(playing.stop().await.broken, 0);
        }
        assert_eq!(error_number.load(Ordering::SeqCst), 1213, "the handler got the deadlock error");
        assert_eq!(
            world.number("select sum(n) div 1 from pair").await,
            202,
            "each update was applied once"
        );
        world.assert_complete(&tally).await;
    }
}
