//! The fence: each event once, by one worker, whole or not at all; and a projector that fails, fails alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use projectionist::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection};
use projectionist::{
    ConvoyBudget, Database, Error, Event, Limits, Mode, PlaySettings, Projector, Queue, Registry, Status, async_trait,
    boot,
};

use crate::support::{
    Faults, FaultyQueue, Gate, PATIENCE, Proxy, Scripted, Tally, World, eventually, execute, registry, seed, server_url,
};

/// Runs a script at one position, and nowhere else.
fn at<F>(tally: &Tally, position: u64, script: F) -> Scripted
where
    F: for<'a> Fn(&'a mut MySqlConnection) -> BoxFuture<'a, anyhow::Result<()>> + Send + Sync + 'static,
{
    Scripted::new(tally, move |event: &Event, db| match event.position.get() == position {
        true => script(db),
        false => Box::pin(async { Ok(()) }),
    })
}

/// Stands at the gate at one position.
fn gated(tally: &Tally, position: u64, gate: &Gate) -> Scripted {
    let gate = gate.clone();
    at(tally, position, move |_| {
        let gate = gate.clone();
        Box::pin(async move {
            gate.pass().await;
            Ok(())
        })
    })
}

fn set(projectors: impl IntoIterator<Item = impl Projector>) -> Registry {
    let mut registry = Registry::new();
    for projector in projectors {
        registry.add(projector).expect("a name of its own");
    }
    registry
}

/// Runs a statement, as a handler would.
async fn run(db: &mut MySqlConnection, sql: &'static str) -> anyhow::Result<()> {
    sqlx::raw_sql(sql).execute(db).await?;
    Ok(())
}

/// Notes the server's number for the error that a handler met, and passes the error on.
fn noting(met: &AtomicU64, result: anyhow::Result<()>) -> anyhow::Result<()> {
    if let Err(error) = &result
        && let Some(sqlx::Error::Database(error)) = error.downcast_ref()
    {
        met.store(error.downcast_ref::<sqlx::mysql::MySqlDatabaseError>().number().into(), Ordering::SeqCst);
    }
    result
}

impl World {
    async fn assert_broken(&self, name: &str, at: u64, because: &str) {
        let entry = self.entry(name).await.expect("it is in the ledger");
        let Status::Broken(failure) = &entry.status else { panic!("{name} is {}", entry.status) };
        let event = failure.event.as_ref().expect("it failed at an event");
        assert_eq!((event.position.get(), entry.position.get()), (at, at - 1), "{failure:?}");
        assert!(failure.error.contains(because), "{:?} does not say {because:?}", failure.error);
    }
}

// Two at once.

#[tokio::test]
async fn two_workers_at_once_apply_each_event_once() {
    let world = World::with_standard_queue().await;
    let (all, closed) = (Tally::new("all_events"), Tally::new("closed").only(&["Closed"]));
    let registry = registry(&[&all, &closed]);
    world.boot(&registry).await;
    let seed = seed();
    // Half of what the one has applied comes again, to the other as likely as not.
    let faults = Faults { undeleted: 50, shuffled: true, ..Faults::default() };
    let queues = [seed, seed + 1].map(|seed| Arc::new(FaultyQueue::new(&world.queue, faults, seed)));
    let settings = PlaySettings { reconcile_after: Duration::from_millis(50), ..World::restless() };
    let workers = queues.clone().map(|queue| world.start_play_from(queue, &registry, settings.clone()));
    for _ in 0..40 {
        world.append(10).await;
    }
    eventually("all is applied and deleted", async || {
        world.position("all_events").await == 400
            && world.position("closed").await == 400
            && world.queue.depth().await.is_ok_and(|depth| depth == 0)
    })
    .await;
    for worker in workers {
        assert_eq!(worker.stop().await.broken, 0);
    }
    assert!(queues.iter().all(|queue| queue.struck().received > 5), "both have worked");
    world.assert_complete(&all).await;
    world.assert_complete(&closed).await;
}

#[tokio::test]
async fn two_boots_at_once_apply_each_event_once_and_both_succeed() {
    let world = World::new().await;
    let (gate, first, second) = (Gate::new(), Tally::new("first"), Tally::new("second"));
    let once = Tally::new("once").mode(Mode::Once);
    let registry = Registry::new().with(gated(&first, 150, &gate)).and_then(|set| set.with(second.clone()));
    let registry = registry.and_then(|set| set.with(once.clone())).expect("names of their own");
    world.append(400).await;
    let overlap = async {
        gate.arrival().await;
        eventually("the other boot waits for this one's row", async || world.lock_waits().await > 0).await;
        gate.open();
    };
    let (one, other, ()) = tokio::join!(world.boot(&registry), world.boot(&registry), overlap);
    assert!(one.is_released() && other.is_released());
    for tally in [&first, &second, &once] {
        world.assert_complete(tally).await;
    }
    assert_eq!(world.status("once").await, "finished");
}

// Who is played, and who is not.

#[tokio::test]
async fn a_projector_booted_while_play_runs_joins_without_a_restart() {
    let world = World::new().await;
    let (old, new) = (Tally::new("old"), Tally::new("new"));
    let both = registry(&[&old, &new]);
    world.boot(&registry(&[&old])).await;
    let playing = world.start_play(&both);
    world.append(50).await;
    eventually("the old one is played", async || world.position("old").await == 50).await;
    assert_eq!(world.status("new").await, "new");

    assert!(world.boot(&both).await.is_released());
    world.append(50).await;
    eventually("the new one is played", async || world.position("new").await == 100).await;
    assert!(playing.is_running());
    playing.stop().await;
    world.assert_complete(&new).await;
    eventually("the old one is, too", async || world.position("old").await == 100).await;
    world.assert_complete(&old).await;
}

#[tokio::test]
async fn an_unbooted_projector_is_never_played() {
    let world = World::new().await;
    let shown = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&shown);
    let unbooted = Tally::new("unbooted").hook(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    let booted = Tally::new("booted");
    world.append(20).await;
    world.boot(&registry(&[&booted])).await;
    world.append(20).await;
    let played = world.play_until_idle(&registry(&[&unbooted, &booted])).await;
    assert!(played.messages > 0);
    assert_eq!((world.status("unbooted").await, shown.load(Ordering::SeqCst)), ("new".into(), 0));
    world.assert_complete(&booted).await;
}

#[tokio::test]
async fn a_stalled_or_broken_projector_is_not_played_until_it_is_booted() {
    let world = World::new().await;
    let (poisoned, mended, other) = (Tally::new("tally").failing_at(5), Tally::new("tally"), Tally::new("other"));
    world.append(10).await;
    assert!(!world.boot(&registry(&[&poisoned, &other])).await.is_released());
    let mended_set = registry(&[&mended, &other]);
    world.append(10).await;
    world.play_until_idle(&mended_set).await;
    assert_eq!((world.status("tally").await, world.status("other").await), ("broken".into(), "stalled".into()));
    assert_eq!(world.position("tally").await, 4);

    assert!(world.boot(&mended_set).await.is_released());
    world.assert_complete(&mended).await;
    world.assert_complete(&other).await;
}

#[tokio::test]
async fn a_live_projector_that_is_retired_while_play_runs_stops() {
    for side_effects in [false, true] {
        let world = World::new().await;
        let (stays, goes) = (Tally::new("stays"), Tally::new("goes"));
        let goes = if side_effects { goes.with_side_effects() } else { goes };
        let both = registry(&[&goes, &stays]);
        world.boot(&both).await;
        let playing = world.start_play(&both);
        world.append(20).await;
        eventually("both are played", async || {
            world.position("stays").await == 20 && world.position("goes").await == 20
        })
        .await;
        // By the release without it, so that its table stays and anything written to it would be seen.
        world.run(&["retire", "goes", "--yes"]).await.exits(0);
        world.append(20).await;
        eventually("the other one goes on", async || world.position("stays").await == 40).await;
        world.boot(&both).await;
        let expected = if side_effects { "retired" } else { "live" };
        assert_eq!(world.status("goes").await, expected, "forgotten, it is new again; retired, it is never");
        playing.stop().await;
        let again = if side_effects { 0 } else { 40 };
        assert_eq!(goes.applied(&world).await.len(), 20 + again);
    }
}

#[tokio::test]
async fn a_projector_that_is_retired_while_boot_runs_leaves_the_boot() {
    let world = World::new().await;
    let (gate, tally, other) = (Gate::new(), Tally::new("tally"), Tally::new("other"));
    let registry = Registry::new().with(gated(&tally, 10, &gate)).and_then(|set| set.with(other.clone()));
    let registry = registry.expect("names of their own");
    world.append(10).await;
    let booting = async { tokio::time::timeout(PATIENCE, world.boot(&registry)).await.expect("boot ends") };
    let retiring = async {
        gate.arrival().await;
        let opening = async {
            // First in line for the row, before the handoff.
            eventually("retire waits for the row", async || world.lock_waits().await == 1).await;
            gate.open();
        };
        tokio::join!(world.run(&["retire", "tally", "--yes"]), opening).0.exits(0);
    };
    let (report, ()) = tokio::join!(booting, retiring);
    assert_eq!(world.status("tally").await, "new", "it is forgotten");
    let of_it = report.projectors.iter().find(|booted| booted.entry.id.name == "tally");
    assert!(of_it.is_none_or(|booted| booted.entry.status == Status::Retired), "{of_it:?}");
    world.assert_complete(&other).await;
}

#[tokio::test]
async fn another_mode_without_another_version_is_refused() {
    let world = World::new().await;
    world.append(10).await;
    world.boot(&registry(&[&Tally::new("tally")])).await;
    for mode in [Mode::FromNow, Mode::Once] {
        let changed = registry(&[&Tally::new("new_one"), &Tally::new("tally").mode(mode)]);
        let refused = boot(&world.database, &changed, Limits::default(), |_| {}).await;
        let Err(Error::Input(reason)) = refused else { panic!("{refused:?}") };
        assert!(reason.contains("tally@1") && reason.contains("new version"), "{reason}");
        assert_eq!((world.status("tally").await, world.status("new_one").await), ("live".into(), "new".into()));
    }
}

#[tokio::test]
async fn a_projector_booted_beside_an_old_release_that_empties_the_queue_misses_nothing() {
    let world = World::new().await;
    let (old, new) = (Tally::new("old"), Tally::new("new"));
    let (old_release, new_release) = (registry(&[&old]), registry(&[&old, &new]));
    world.append(100).await;
    world.boot(&old_release).await;
    let old_worker = world.start_play(&old_release);
    let appending = async {
        for _ in 0..30 {
            world.append(5).await;
        }
    };
    let (report, ()) = tokio::join!(world.boot(&new_release), appending);
    assert!(report.is_released());
    let handed_over_at = world.position("new").await;
    world.append(50).await;
    eventually("the old release has emptied the queue", async || {
        world.position("old").await == 300 && world.queue.depth().await.is_ok_and(|depth| depth == 0)
    })
    .await;
    assert!(old_worker.stop().await.messages > 0);
    assert_eq!(world.position("new").await, handed_over_at, "an old release does not touch what it does not know");
    assert!(handed_over_at <= 250, "no message will bring what lies between");

    world.play_until_idle(&new_release).await;
    world.assert_complete(&old).await;
    world.assert_complete(&new).await;
}

// One that fails, fails alone.

/// Where the projector fails that is to fail: in the middle of a batch, after the boot.
const POISON: u64 = 45;

/// Plays three projectors of which the second fails at [`POISON`], and asserts that the others do not notice.
async fn fails_alone(fault: impl Fn(&Tally) -> Scripted, because: &str) -> (World, Tally) {
    fails_alone_within(ConvoyBudget::default(), fault, because).await
}

async fn fails_alone_within(convoy: ConvoyBudget, fault: impl Fn(&Tally) -> Scripted, because: &str) -> (World, Tally) {
    let world = World::new().await;
    let (before, faulty, after) = (Tally::new("earlier"), Tally::new("faulty"), Tally::new("later"));
    let registry = Registry::new().with(before.clone()).and_then(|set| set.with(fault(&faulty)));
    let registry = registry.and_then(|set| set.with(after.clone())).expect("names of their own");
    world.append(30).await;
    assert!(world.boot(&registry).await.is_released());
    world.append(30).await;
    let limits = Limits { handler_timeout: Duration::from_millis(500), ..World::play_settings().limits };
    let settings = PlaySettings { limits, convoy, ..World::play_settings() };
    let played = world.play_with(Arc::clone(&world.queue) as Arc<dyn Queue>, &registry, settings).await;

    assert_eq!(played.broken, 1);
    world.assert_broken("faulty", POISON, because).await;
    world.assert_complete(&before).await;
    world.assert_complete(&after).await;
    // Nobody holds the row: a boot of the mended projector need not wait.
    world.execute("select 1 from projectors where name = 'faulty' for update nowait").await;
    (world, faulty)
}

#[tokio::test]
async fn an_error_breaks_only_its_projector_and_its_writes_are_rolled_back() {
    let fault = |tally: &Tally| at(tally, POISON, |_| Box::pin(async { anyhow::bail!("poison") }));
    let (world, faulty) = fails_alone(fault, "poison").await;
    world.assert_folded(&faulty).await;
}

#[tokio::test]
async fn an_sql_error_breaks_only_its_projector() {
    let fault = |tally: &Tally| {
        at(tally, POISON, |db| Box::pin(run(db, "update faulty set no_such_column = 1 where position = 1")))
    };
    let (world, faulty) = fails_alone(fault, "no_such_column").await;
    world.assert_folded(&faulty).await;
}

#[tokio::test]
async fn a_panic_breaks_only_its_projector() {
    let fault = |tally: &Tally| at(tally, POISON, |_| Box::pin(async { panic!("at the poison") }));
    let (world, faulty) = fails_alone(fault, "panicked: at the poison").await;
    world.assert_folded(&faulty).await;
}

#[tokio::test]
async fn a_handler_that_never_ends_breaks_only_its_projector() {
    let fault = |tally: &Tally| at(tally, POISON, |_| Box::pin(std::future::pending()));
    let (world, faulty) = fails_alone(fault, "took longer than").await;
    world.assert_folded(&faulty).await;
}

#[tokio::test]
async fn a_statement_that_never_ends_breaks_only_its_projector_and_is_ended() {
    let began = Instant::now();
    let fault = |tally: &Tally| at(tally, POISON, |db| Box::pin(run(db, "select sleep(1000)")));
    let (world, faulty) = fails_alone(fault, "took longer than").await;
    assert!(began.elapsed() < PATIENCE);
    world.assert_folded(&faulty).await;
    let sleeping = format!(
        "select count(*) from information_schema.processlist where db = '{}' and info = 'select sleep(1000)'",
        world.database_name
    );
    eventually("the server has ended the statement", async || world.number(&sleeping).await == 0).await;
}

#[tokio::test]
async fn a_statement_that_never_ends_and_is_put_out_of_the_convoy_breaks_only_its_projector() {
    let fault = |tally: &Tally| at(tally, POISON, |db| Box::pin(run(db, "select sleep(1000)")));
    // Cut off here first, before the handler's own time is over.
    let convoy = ConvoyBudget { time: Duration::from_millis(100), ..ConvoyBudget::default() };
    let (world, faulty) = fails_alone_within(convoy, fault, "took longer than").await;
    world.assert_folded(&faulty).await;
}

/// Of these three, only position and status are promised: what such a handler writes is stored without its position, from
/// the events before it in the batch and, outside any transaction, from those after it.
#[tokio::test]
async fn a_statement_that_commits_by_itself_breaks_only_its_projector() {
    let fault = |tally: &Tally| {
        at(tally, POISON, |db| Box::pin(run(db, "create table if not exists made_by_a_handler (id int primary key)")))
    };
    fails_alone(fault, "committed the transaction").await;
}

#[tokio::test]
async fn a_handler_that_commits_breaks_only_its_projector() {
    let fault = |tally: &Tally| at(tally, POISON, |db| Box::pin(run(db, "commit")));
    fails_alone(fault, "committed the transaction").await;
}

#[tokio::test]
async fn a_handler_that_rolls_back_breaks_only_its_projector() {
    let fault = |tally: &Tally| at(tally, POISON, |db| Box::pin(run(db, "rollback")));
    fails_alone(fault, "the transaction").await;
}

#[tokio::test]
async fn an_error_between_events_that_are_not_wanted_leaves_the_position_just_before_it() {
    let world = World::new().await;
    // Every third event is wanted: 3, 6, … 45 in play, 15 in boot.
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

/// Fails in its setup, until it is mended.
struct BadSetup {
    tally: Tally,
    is_mended: Arc<AtomicBool>,
}

#[async_trait]
impl Projector for BadSetup {
    fn name(&self) -> &str {
        self.tally.name()
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        anyhow::ensure!(self.is_mended.load(Ordering::SeqCst), "no such tablespace");
        self.tally.setup(db).await
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.tally.handle(event, db).await
    }
}

#[tokio::test]
async fn a_projector_that_fails_in_setup_is_broken_before_any_event_and_can_be_mended() {
    let world = World::new().await;
    let (first, bad, last) = (Tally::new("first"), Tally::new("bad"), Tally::new("last"));
    let is_mended = Arc::new(AtomicBool::new(false));
    let bad_setup = BadSetup { tally: bad.clone(), is_mended: Arc::clone(&is_mended) };
    let registry = Registry::new().with(first.clone()).and_then(|set| set.with(bad_setup));
    let registry = registry.and_then(|set| set.with(last.clone())).expect("names of their own");
    world.append(10).await;
    assert!(!world.boot(&registry).await.is_released());
    let entry = world.entry("bad").await.expect("it is in the ledger");
    let failure = entry.status.failure().expect("it is broken");
    assert!(failure.event.is_none() && failure.error.contains("no such tablespace"), "{failure:?}");
    for name in ["first", "last"] {
        assert_eq!((world.status(name).await, world.position(name).await), ("stalled".into(), 0));
    }
    is_mended.store(true, Ordering::SeqCst);
    assert!(world.boot(&registry).await.is_released());
    for tally in [&first, &bad, &last] {
        world.assert_complete(tally).await;
    }
}

#[tokio::test]
async fn a_boot_after_a_failure_resumes_each_projector_and_shows_no_event_twice() {
    let world = World::new().await;
    let is_mended = Arc::new(AtomicBool::new(false));
    let shown: Vec<Arc<AtomicU64>> = (0..3).map(|_| Arc::default()).collect();
    let tallies: Vec<Tally> = (0..3)
        .map(|n| {
            let (is_mended, shown) = (Arc::clone(&is_mended), Arc::clone(&shown[n]));
            Tally::new(["first", "poisoned", "last"][n]).hook(move |event| {
                let is_poison = n == 1 && event.position.get() == 250 && !is_mended.load(Ordering::SeqCst);
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
        assert!((200..600).contains(&world.position(name).await), "it stopped where the other failed");
        world.assert_folded(tally).await;
    }
    is_mended.store(true, Ordering::SeqCst);
    for count in &shown {
        count.store(0, Ordering::SeqCst);
    }
    let stood: Vec<u64> = [world.position("first").await, 249, world.position("last").await].into();
    assert!(world.boot(&registry).await.is_released());
    for n in 0..3 {
        assert_eq!(
            shown[n].load(Ordering::SeqCst),
            600 - stood[n],
            "{} goes on from where it stood",
            tallies[n].name()
        );
        world.assert_complete(&tallies[n]).await;
    }
}

// What is transient breaks nobody.

/// Two rows for others to lock.
async fn create_pair(world: &World) {
    world.execute("create table pair (id int primary key, n int not null)").await;
    world.execute("insert into pair values (1, 0), (2, 0)").await;
}

#[tokio::test]
async fn a_deadlock_in_a_handler_is_tried_again_and_breaks_nobody() {
    let world = World::new().await;
    create_pair(&world).await;
    let (gate, tally, met) = (Gate::new(), Tally::new("tally"), Arc::new(AtomicU64::new(0)));
    let (at_gate, noted) = (gate.clone(), Arc::clone(&met));
    let scripted = at(&tally, 5, move |db| {
        let (gate, met) = (at_gate.clone(), Arc::clone(&noted));
        Box::pin(async move {
            run(db, "update pair set n = n + 1 where id = 1").await?;
            gate.pass().await;
            noting(&met, run(db, "update pair set n = n + 1 where id = 2").await)
        })
    });
    let registry = set([scripted]);
    world.boot(&registry).await;
    world.append(10).await;

    let playing = world.start_play(&registry);
    gate.arrival().await;
    let mut other = world.connection().await;
    execute(&mut other, "create table ballast (n int not null)").await;
    execute(&mut other, "begin").await;
    // Many rows changed: of two in a deadlock, the server gives up the one that has done less.
    let many = "with recursive n as (select 1 as n union all select n + 1 from n where n < 900) select n from n";
    execute(&mut other, &format!("insert into ballast {many}")).await;
    execute(&mut other, "update pair set n = n + 100 where id = 2").await;
    let other = tokio::spawn(async move {
        execute(&mut other, "update pair set n = n + 100 where id = 1").await;
        execute(&mut other, "commit").await;
    });
    eventually("the other waits for the handler", async || world.lock_waits().await == 1).await;
    gate.open();
    other.await.expect("the other one won");
    eventually("it is at the end", async || world.position("tally").await == 10).await;
    assert_eq!(playing.stop().await.broken, 0);
    assert_eq!(met.load(Ordering::SeqCst), 1213, "the handler lost");
    assert_eq!(world.number("select sum(n) div 1 from pair").await, 202, "its first update was made once");
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_lock_wait_timeout_in_a_handler_is_tried_again_and_breaks_nobody() {
    let world = World::new().await;
    create_pair(&world).await;
    let (tally, met) = (Tally::new("tally"), Arc::new(AtomicU64::new(0)));
    let noted = Arc::clone(&met);
    let scripted = at(&tally, 5, move |db| {
        let met = Arc::clone(&noted);
        Box::pin(async move {
            run(db, "set session innodb_lock_wait_timeout = 1").await?;
            noting(&met, run(db, "update pair set n = n + 1 where id = 1").await)
        })
    });
    let registry = set([scripted]);
    world.boot(&registry).await;
    let mut other = world.connection().await;
    execute(&mut other, "begin").await;
    execute(&mut other, "update pair set n = n + 100 where id = 1").await;
    world.append(10).await;
    let playing = world.start_play(&registry);
    eventually("the handler's wait has timed out", async || met.load(Ordering::SeqCst) == 1205).await;
    assert_eq!(world.status("tally").await, "live");
    execute(&mut other, "commit").await;
    eventually("it is at the end", async || world.position("tally").await == 10).await;
    assert_eq!(playing.stop().await.broken, 0);
    assert_eq!(world.number("select n from pair where id = 1").await, 101);
    world.assert_complete(&tally).await;
}

/// Stands at the gate at one position, and tells which session it is in.
fn gated_in_session(tally: &Tally, position: u64, gate: &Gate, session: &Arc<AtomicU64>) -> Scripted {
    let (gate, session) = (gate.clone(), Arc::clone(session));
    at(tally, position, move |db| {
        let (gate, session) = (gate.clone(), Arc::clone(&session));
        Box::pin(async move {
            let own: u64 = sqlx::query_scalar("select cast(connection_id() as unsigned)").fetch_one(&mut *db).await?;
            session.store(own, Ordering::SeqCst);
            gate.pass().await;
            run(db, "select 1").await
        })
    })
}

#[tokio::test]
async fn a_connection_killed_in_the_middle_of_a_transaction_breaks_nobody_in_boot_and_in_play() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    for (position, in_boot) in [(150, true), (250, false)] {
        let (gate, session) = (Gate::new(), Arc::new(AtomicU64::new(0)));
        let registry = set([gated_in_session(&tally, position, &gate, &session)]);
        world.append(200).await;
        let killing = async {
            gate.arrival().await;
            let killed = session.load(Ordering::SeqCst);
            world.execute(&format!("kill {killed}")).await;
            gate.open();
            eventually("it is in another session", async || session.load(Ordering::SeqCst) != killed).await;
        };
        match in_boot {
            true => assert!(tokio::join!(world.boot(&registry), killing).0.is_released()),
            false => assert_eq!(tokio::join!(world.play_until_idle(&registry), killing).0.broken, 0),
        }
        world.assert_complete(&tally).await;
    }
}

/// Kills one session after the other, whatever it is in, until it is told to stop: one for every so many events shown,
/// so that a slow server is not killed to a standstill.
async fn kill_at_random(world: &World, mut dice: fastrand::Rng, shown: &AtomicU64, stop: &AtomicBool) -> u64 {
    let mut killer = MySqlConnection::connect(&server_url()).await.expect("the server answers");
    let mut killed = 0;
    while !stop.load(Ordering::SeqCst) {
        let sessions: Vec<u64> =
            sqlx::query_scalar("select cast(id as unsigned) from information_schema.processlist where db = ?")
                .bind(&world.database_name)
                .fetch_all(&mut killer)
                .await
                .expect("the sessions");
        if let Some(session) = dice.choice(sessions) {
            killed +=
                u64::from(sqlx::raw_sql(AssertSqlSafe(format!("kill {session}"))).execute(&mut killer).await.is_ok());
        }
        let next = shown.load(Ordering::SeqCst) + dice.u64(20..80);
        eventually("it gets on", async || stop.load(Ordering::SeqCst) || shown.load(Ordering::SeqCst) >= next).await;
    }
    killed
}

#[tokio::test]
async fn sessions_killed_at_random_break_nobody_in_boot_and_in_play() {
    let world = World::new().await;
    let mut dice = fastrand::Rng::with_seed(seed());
    let shown = Arc::new(AtomicU64::new(0));
    let counted = |tally: Tally| {
        let shown = Arc::clone(&shown);
        tally.hook(move |_| {
            shown.fetch_add(1, Ordering::SeqCst);
            Ok(())
        })
    };
    let tallies =
        [Tally::new("all_events"), Tally::new("closed").only(&["Closed"]), Tally::new("once").mode(Mode::Once)];
    let tallies = tallies.map(counted);
    let registry = registry(&[&tallies[0], &tallies[1], &tallies[2]]);
    world.append(1_500).await;
    let limits = Limits { batch: 20, patience: Some(PATIENCE), ..Limits::default() };

    let stop = AtomicBool::new(false);
    let booting = async {
        let report = boot(&world.database, &registry, limits, |_| {}).await;
        stop.store(true, Ordering::SeqCst);
        report.expect("boot comes to an end")
    };
    let (report, killed) = tokio::join!(booting, kill_at_random(&world, dice.fork(), &shown, &stop));
    assert!(report.is_released() && killed > 2, "{killed} sessions killed: {report:?}");
    for tally in &tallies {
        world.assert_complete(tally).await;
    }

    world.append(500).await;
    stop.store(false, Ordering::SeqCst);
    let playing = async {
        let settings = PlaySettings { limits, ..World::play_settings() };
        let played = world.play_with(Arc::clone(&world.queue) as Arc<dyn Queue>, &registry, settings).await;
        stop.store(true, Ordering::SeqCst);
        played
    };
    let (played, killed) = tokio::join!(playing, kill_at_random(&world, dice.fork(), &shown, &stop));
    assert!(played.broken == 0 && killed > 2, "{killed} sessions killed: {played:?}");
    world.assert_complete(&tallies[0]).await;
    world.assert_complete(&tallies[1]).await;
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_neither_missed_nor_repeated() {
    let world = World::new().await;
    let proxy = Proxy::new(&world, 30, seed()).await;
    let database = Database::connect(&proxy.database_url, 8, PATIENCE).await.expect("the server answers");
    let tallies =
        [Tally::new("all_events"), Tally::new("closed").only(&["Closed"]), Tally::new("once").mode(Mode::Once)];
    let registry = registry(&[&tallies[0], &tallies[1], &tallies[2]]);
    world.append(300).await;
    let limits = Limits { batch: 10, patience: Some(PATIENCE), ..Limits::default() };
    let report = boot(&database, &registry, limits, |_| {}).await.expect("boot comes to an end");
    assert!(report.is_released(), "{report:?}");
    let (before, after) = proxy.cuts();
    assert!(before > 3 && after > 3, "commits cut in boot: {before} before, {after} after");
    for tally in &tallies {
        world.assert_complete(tally).await;
    }

    world.append(300).await;
    let settings = PlaySettings { limits, ..World::play_settings() };
    let playing = projectionist::play(
        &database,
        Arc::clone(&world.queue) as Arc<dyn Queue>,
        &registry,
        settings,
        std::future::pending(),
    );
    let played = tokio::time::timeout(PATIENCE, playing).await.expect("play becomes idle").expect("play ends");
    assert_eq!(played.broken, 0);
    let (in_play_before, in_play_after) = proxy.cuts();
    assert!(in_play_before > before + 3 && in_play_after > after + 3, "{} commits", proxy.commits());
    world.assert_complete(&tallies[0]).await;
    world.assert_complete(&tallies[1]).await;
}
