//! Handlers that change their session in any way. Either their read model is a fold of the log, or
//! they are broken with the reason. They do not affect other projectors.

use std::fmt;
use std::sync::Arc;

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use projectionist::{Event, Limits, Projector, Queue, Registry, SessionUse, async_trait, boot};
use tokio::time::{Duration, sleep};

use crate::support::{Folder, TIMEOUT, Tally, World, eventually, execute, seed_or, side_by_side};

/// Inserts a row whose values depend on the session: time zone, character sets, limits, precision,
/// isolation level and default database. In a clean session, the values are the same for every
/// event.
fn insert_into(table: &str) -> String {
    format!(
        "insert into {table} \
         select ?, from_unixtime(86400), 1 / 3, (select group_concat(n order by n) \
         from numbers), 'é日本', \
         (select count(*) from dirty), database(), concat(@left_behind, ''), \
         date_format('2001-03-01', '%M'), \
         now() > '2020-01-01', ?"
    )
}

fn create(table: &str) -> String {
    format!(
        "create table if not exists {table} (position bigint unsigned not null, \
         at datetime(6) not null, \
         third decimal(20, 12) not null, list text not null, word varchar(20) character set \
         utf8mb4 not null, \
         uncommitted bigint not null, shop varchar(64) not null, left_behind varchar(20) null, \
         month varchar(20) not null, \
         clock_goes tinyint not null, numbers bigint not null) engine = innodb"
    )
}

/// The rows of such a table, as lines of text without the database's name, which differs in each
/// world.
async fn rows(world: &World, table: &str) -> Vec<String> {
    let select = format!(
        "select concat_ws('|', position, at, third, list, hex(convert(word using utf8mb4)), \
         uncommitted, \
         if(shop = database(), 'here', shop), ifnull(left_behind, 'nothing'), month, clock_goes, \
         numbers) \
         from {table} order by position"
    );
    sqlx::query_scalar(AssertSqlSafe(select))
        .fetch_all(&mut world.connection().await)
        .await
        .expect("the table exists")
}

/// A projector that records the state of its session and then runs its script.
#[derive(Clone)]
struct SessionProbe {
    name: String,
    session: SessionUse,
    script: Arc<[Action]>,
}

/// The actions of a handler at one event.
#[derive(Debug, Clone)]
struct Action {
    position: u64,
    statements: Vec<String>,
    /// Whether the handler returns the error of a statement.
    propagates_errors: bool,
    /// Whether the statements run before the row is written.
    is_first: bool,
}

impl SessionProbe {
    fn victim(name: &str, session: SessionUse) -> Self {
        SessionProbe { name: name.into(), session, script: Arc::new([]) }
    }

    fn hostile(name: &str, script: Vec<Action>) -> Self {
        SessionProbe { name: name.into(), session: SessionUse::Dedicated, script: script.into() }
    }

    async fn act(
        &self,
        event: &Event,
        is_first: bool,
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        let position = event.position().get();
        for action in self
            .script
            .iter()
            .filter(|action| action.position == position && action.is_first == is_first)
        {
            for statement in &action.statements {
                let done = sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut *db).await;
                if action.propagates_errors {
                    done?;
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for SessionProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}", self.name, self.script)
    }
}

#[async_trait]
impl Projector for SessionProbe {
    fn name(&self) -> &str {
        &self.name
    }

    fn session(&self) -> SessionUse {
        self.session
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        sqlx::query(AssertSqlSafe(create(&self.name))).execute(db).await?;
        Ok(())
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.act(event, true, db).await?;
        let numbers = sqlx::query("select n from numbers").fetch_all(&mut *db).await?.len() as u64;
        let insert = insert_into(&self.name);
        sqlx::query(AssertSqlSafe(insert))
            .bind(event.position().get())
            .bind(numbers)
            .execute(&mut *db)
            .await?;
        self.act(event, false, db).await
    }
}

/// A projector file that records the same state of its session.
fn declared_victim() -> String {
    let insert = insert_into("declared").replacen('?', ":position", 1).replacen(
        '?',
        "(select count(*) from numbers)",
        1,
    );
    let insert =
        insert.replace("concat(@left_behind, '')", "null").replace('\'', "''").replace("''", "'");
    format!(
        "name = \"declared\"\nversion = 1\nmode = \"from_beginning\"\nsetup = \
         [\"\"\"{}\"\"\"]\n\n[[on]]\nevents = [\"*\"]\nsql = \"\"\"{insert}\"\"\"\n",
        create("declared")
    )
}

/// The number of databases in which handlers run side by side.
const WORLDS: usize = 3;

/// Each statement is tried alone, and the property test combines them. `{n}` is replaced by the
/// number of the handler: such a name is one for the whole server.
const STATEMENTS: &[&str] = &[
    "commit",
    "rollback",
    "begin",
    "start transaction read only",
    "set autocommit = 1",
    "set autocommit = 1; set autocommit = 0",
    "commit and chain",
    "rollback and chain",
    "savepoint mine",
    "savepoint mine; rollback to savepoint mine",
    "rollback to savepoint no_such_savepoint",
    "release savepoint no_such_savepoint",
    "create table if not exists junk_{n} (id int)",
    "drop table if exists junk_{n}",
    "create temporary table if not exists tmp_{n} (id int)",
    "create temporary table if not exists victim (position bigint unsigned)",
    "create temporary table if not exists declared (position bigint unsigned)",
    "create temporary table if not exists events (position bigint unsigned)",
    "create temporary table if not exists event_log (high_water bigint unsigned)",
    "create temporary table if not exists projectors like projectors",
    "truncate table junk",
    "analyze table junk",
    "lock tables junk write",
    "lock tables junk write; unlock tables",
    "flush tables junk",
    "use information_schema",
    "use mysql",
    "set session transaction isolation level read uncommitted",
    "set session transaction isolation level serializable",
    "set session transaction read only",
    "set completion_type = 1",
    "set completion_type = 2",
    "set completion_type = 2; rollback",
    "kill connection_id()",
    "rollback; set completion_type = 2",
    "rollback and chain; set completion_type = 2",
    "commit; set completion_type = 2",
    "set sql_select_limit = 2",
    "set sql_safe_updates = 1",
    "set foreign_key_checks = 0",
    "set unique_checks = 0",
    "set names latin1",
    "set character_set_results = latin1",
    "set character_set_client = latin1",
    "set time_zone = '+05:00'",
    "set sql_mode = ''",
    "set sql_mode = 'ANSI_QUOTES'",
    "set group_concat_max_len = 4",
    "set div_precision_increment = 0",
    "set lc_time_names = 'de_DE'",
    "set timestamp = 1",
    "set @left_behind = 'something'",
    "set max_sort_length = 8",
    "set auto_increment_increment = 7",
    "set innodb_lock_wait_timeout = 1",
    "set lock_wait_timeout = 1",
    "set wait_timeout = 600",
    "select get_lock('theirs_{n}', 0)",
    "do release_all_locks()",
    "prepare theirs from 'select 1'",
    "insert into no_such_table values (1)",
    "insert into junk values (null, 'too many')",
    "update numbers set n = n where n = 1",
    "signal sqlstate '45000' set message_text = 'theirs'",
    "delete from projectors where name = 'no_such_projector'",
    "xa start 'theirs_{n}'",
    "rollback and chain; set autocommit = 1; xa start 'theirs_{n}'",
    "rollback; set autocommit = 1; xa start 'theirs_{n}'",
    "set role none",
    "call their_procedure()",
    "insert into junk values (1)",
    "replace into junk values (2)",
];

/// Creates tables that the projectors read, and opens a transaction that never commits.
async fn prepare(world: &World) -> MySqlConnection {
    world.execute("create table numbers (n int primary key)").await;
    let numbers = "insert into numbers with recursive n as (select 1 as n union all select n + 1 \
                   from n where n < 12) select n from n";
    world.execute(numbers).await;
    world.execute("create table junk (id int)").await;
    world.execute("create table dirty (id int)").await;
    world
        .execute(
            "create procedure their_procedure() begin declare continue handler for sqlexception \
             begin end; \
             set time_zone = '+07:00'; insert into no_such_table \
             values (1); set time_zone = '+00:00'; end",
        )
        .await;
    let mut uncommitted = world.connection().await;
    execute(&mut uncommitted, "begin").await;
    execute(&mut uncommitted, "insert into dirty values (1)").await;
    uncommitted
}

fn registry(subjects: &[SessionProbe], folder: &Folder) -> Registry {
    let mut registry = Registry::new();
    for subject in subjects {
        registry.add(subject.clone()).expect("the name is unique");
    }
    projectionist::load(std::path::Path::new(&folder.path()), &mut registry)
        .expect("the file is valid");
    registry
}

/// The rows that the table of each unaffected projector must hold after `events` events.
async fn expected(events: usize) -> Vec<String> {
    let world = World::new().await;
    let _uncommitted = prepare(&world).await;
    let folder = Folder::new().with("declared.toml", &declared_victim());
    let registry = registry(&[SessionProbe::victim("victim", SessionUse::Dedicated)], &folder);
    world.append(events).await;
    assert!(world.boot(&registry).await.is_released());
    let rows = rows(&world, "victim").await;
    assert_eq!(rows.len(), events);
    assert!(
        rows[0].contains("|1970-01-02 00:00:00.000000|")
            && rows[0].contains("|0|here|nothing|March|1|12"),
        "{}",
        rows[0]
    );
    rows
}

/// Boots and plays the hostile projectors among unaffected ones, with half of the events appended
/// after the boot. Asserts the rows of every projector.
async fn assert_isolated(hostile: Vec<SessionProbe>, events: usize, expected: &[String]) {
    let world = World::new().await;
    let _uncommitted = prepare(&world).await;
    let folder = Folder::new().with("declared.toml", &declared_victim());
    let mut subjects = vec![
        SessionProbe::victim("victim", SessionUse::Dedicated),
        SessionProbe::victim("shared", SessionUse::Shared),
    ];
    subjects.extend(hostile.iter().cloned());
    subjects.push(SessionProbe::victim("last", SessionUse::Shared));
    let registry = registry(&subjects, &folder);
    world.append(events / 2).await;
    // Some handlers wait for a lock that is never released.
    let limits = Limits::default().with_batch(100).with_handler_timeout(Duration::from_secs(10));
    // Each projector is booted alone, because a boot ends with the first broken one.
    for projector in &subjects {
        let registry = Registry::new().with(projector.clone()).expect("the name is unique");
        let booted = boot(&world.database, &registry, limits, |_| {});
        let Ok(booted) = tokio::time::timeout(TIMEOUT * 2, booted).await else {
            panic!("the boot does not end: {projector}");
        };
        booted.expect("boot succeeds");
    }
    let mut declared = Registry::new();
    projectionist::load(std::path::Path::new(&folder.path()), &mut declared)
        .expect("the file is valid");
    assert!(world.boot(&declared).await.is_released());
    world.append(events - events / 2).await;
    let queue = Arc::clone(&world.queue) as Arc<dyn Queue>;
    world.play_with(queue, &registry, World::play_settings().with_limits(limits)).await;

    for victim in ["victim", "shared", "last", "declared"] {
        let mut found = rows(&world, victim).await;
        if victim == "declared" {
            // The declared projector reads no user variable, because a file's variables are reset
            // for each event.
            assert_eq!(world.status(victim).await, "live");
        }
        found.sort_by_key(|row| {
            row.split('|').next().and_then(|position| position.parse::<u64>().ok())
        });
        assert_eq!(
            found,
            expected,
            "{victim} beside {}",
            hostile.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        );
    }
    for subject in &hostile {
        let entry = world.entry(&subject.name).await.expect("the projector is in the ledger");
        // A user variable of a handler stays in that handler's own session, like a variable in its
        // memory.
        let found: Vec<String> = rows(&world, &subject.name)
            .await
            .iter()
            .map(|row| row.replace("|something|", "|nothing|"))
            .collect();
        let at = entry.position.get() as usize;
        match entry.status.failure() {
            None => {
                assert_eq!((at, &found[..]), (events, expected), "{subject} is {}", entry.status)
            }
            Some(failure) if entry.rebuild_reason.is_some() => {
                assert!(failure.error.contains("rebuild"), "{subject}: {failure:?}");
            }
            Some(failure) => {
                assert!(!failure.error.is_empty(), "{subject}");
                assert_eq!(found[..], expected[..at], "{subject} broke: {failure:?}");
            }
        }
    }
    // The mark and the audit are not affected.
    assert_eq!(world.high_water().await, world.last_position().await);
    world.run(&["audit"]).await.exits(0);
}

#[tokio::test]
async fn a_hostile_statement_yields_the_fold_or_breaks_only_its_projector() {
    let events = 12;
    let expected = expected(events).await;
    let statements: Vec<(usize, &str)> = STATEMENTS.iter().copied().enumerate().collect();
    side_by_side(WORLDS, statements.chunks(12), async |statements| {
        let hostile = statements.iter().flat_map(|(number, statement)| {
            [true, false].map(|propagates_errors| {
                let name = format!("hostile_{number}_{propagates_errors}");
                let statements = vec![statement.replace("{n}", &number.to_string())];
                // In the middle of the boot's batch, and in the middle of the events that play
                // applies.
                let at = |position| Action {
                    position,
                    statements: statements.clone(),
                    propagates_errors,
                    is_first: true,
                };
                SessionProbe::hostile(&name, vec![at(3), at(9)])
            })
        });
        assert_isolated(hostile.collect(), events, &expected).await;
    })
    .await;
}

/// The number of random handlers in the property test. The variable `HOSTILE_HANDLERS` overrides
/// it.
const HANDLERS: usize = 36;

/// The suite runs the same handlers each time. `TEST_SEED` names others.
const SEED: u64 = 4_794_402_414_305_537_142;

#[tokio::test]
async fn a_random_handler_yields_the_fold_or_breaks_only_its_projector() {
    let mut dice = fastrand::Rng::with_seed(seed_or(SEED));
    let handlers = std::env::var("HOSTILE_HANDLERS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(HANDLERS);
    let events = 12;
    let expected = expected(events).await;
    let mut random_handler = |number: usize| {
        let actions = (0..dice.usize(1..4)).map(|_| Action {
            position: dice.u64(1..=events as u64),
            statements: (0..dice.usize(1..4))
                .map(|_| {
                    STATEMENTS[dice.usize(..STATEMENTS.len())].replace("{n}", &number.to_string())
                })
                .collect(),
            propagates_errors: dice.bool(),
            is_first: dice.bool(),
        });
        SessionProbe::hostile(&format!("hostile_{number}"), actions.collect())
    };
    let hostile: Vec<SessionProbe> = (0..handlers).map(&mut random_handler).collect();
    side_by_side(WORLDS, hostile.chunks(12), async |hostile| {
        assert_isolated(hostile.to_vec(), events, &expected).await;
    })
    .await;
}

/// A projector whose setup leaves its session in a state that no projector may see.
struct HostileSetup(SessionProbe);

#[async_trait]
impl Projector for HostileSetup {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.0.setup(db).await?;
        for statement in STATEMENTS.iter().filter(|statement| {
            statement.starts_with("set ") || statement.starts_with("create temporary")
        }) {
            let _ =
                sqlx::raw_sql(AssertSqlSafe(statement.replace("{n}", "0"))).execute(&mut *db).await;
        }
        Ok(())
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.0.handle(event, db).await
    }
}

#[tokio::test]
async fn session_state_left_by_a_setup_reaches_no_projector() {
    let expected = expected(12).await;
    let world = World::new().await;
    let _uncommitted = prepare(&world).await;
    let registry = Registry::new()
        .with(HostileSetup(SessionProbe::victim("hostile", SessionUse::Dedicated)))
        .and_then(|set| set.with(SessionProbe::victim("victim", SessionUse::Dedicated)))
        .expect("the names are unique");
    world.append(6).await;
    assert!(world.boot(&registry).await.is_released());
    world.append(6).await;
    world.play_until_idle(&registry).await;
    for table in ["hostile", "victim"] {
        assert_eq!(rows(&world, table).await, expected, "{table}");
    }
}

#[tokio::test]
async fn the_mark_ignores_a_handlers_isolation_level() {
    let world = World::new().await;
    let _uncommitted = prepare(&world).await;
    let levels = "set session transaction isolation level read uncommitted";
    let at = |position| Action {
        position,
        statements: vec![levels.into()],
        propagates_errors: true,
        is_first: true,
    };
    let tally = Tally::new("tally");
    let hostile = SessionProbe::hostile("hostile", (1..=40).map(at).collect());
    let registry = Registry::new()
        .with(hostile)
        .and_then(|set| set.with(tally.clone()))
        .expect("the names are unique");
    world.boot(&registry).await;
    world.append(10).await;
    let playing = world.start_play(&registry);
    eventually("the hostile projector is broken", async || {
        world.status("hostile").await == "broken"
    })
    .await;

    let mut writer = world.connection().await;
    execute(&mut writer, "begin").await;
    execute(
        &mut writer,
        "insert into events (stream_id, stream_version, event_type, payload) \
         values ('x', 1, 'Late', '{}')",
    )
    .await;
    world.append(5).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(world.high_water().await, 10, "the mark waits for the uncommitted row");
    assert!(world.position("tally").await <= 10);
    execute(&mut writer, "rollback").await;
    eventually("the tally is at the end", async || {
        world.position("tally").await == world.last_position().await
    })
    .await;
    playing.stop().await;
    world.assert_complete(&tally).await;
}
