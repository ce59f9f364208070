//! Coalesced inserts: many rows that a declared projector writes with one statement. The tests
//! state when inserts are coalesced and when not, and that the result is the same as row by row.

use std::fmt::Write as _;

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use projectionist::{
    Event, EventTypes, Limits, MultiRowInsert, NewEvent, Projector, Registry, async_trait, boot,
    load,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use crate::support::{Folder, Session, World, event, eventually, execute, is_mariadb, seed};

/// Handlers over tables that are written `<a>`, and the statements that prepare the tables.
#[derive(Default)]
struct Case {
    /// Run first, as the owner of the tables.
    setup: Vec<String>,
    /// The event types, as in a file, and a statement.
    handlers: Vec<(&'static str, String)>,
}

impl Case {
    fn new(setup: &[&str], handlers: &[&str]) -> Self {
        Case {
            setup: setup.iter().map(|sql| (*sql).to_owned()).collect(),
            handlers: handlers
                .iter()
                .map(|sql| ("'Opened', 'Amended', 'Closed'", (*sql).to_owned()))
                .collect(),
        }
    }
}

/// The final state of a projector.
#[derive(Debug, PartialEq)]
struct Outcome {
    status: String,
    position: u64,
    failure: Option<String>,
    /// The rows of all its tables, sorted.
    rows: Vec<String>,
}

/// How a projector sends its inserts.
#[derive(Debug, Clone, Copy)]
enum InsertMode {
    /// Coalesced where possible.
    Coalesced,
    /// One statement per row. The file writes its tables with the database's name, which turns
    /// coalescing off.
    RowByRow,
}

impl InsertMode {
    fn name(self) -> &'static str {
        match self {
            InsertMode::Coalesced => "together",
            InsertMode::RowByRow => "alone",
        }
    }

    /// The table's name. Names have the same length in both modes, because errors contain them.
    fn table(self, world: &World, table: &str) -> String {
        match self {
            InsertMode::Coalesced => format!("together_{table}"),
            InsertMode::RowByRow => format!("{}.alone_{table}", world.database_name),
        }
    }

    fn sql(self, world: &World, sql: &str) -> String {
        ["a", "b", "c"].iter().fold(sql.replace("<way>", self.name()), |sql, table| {
            sql.replace(&format!("<{table}>"), &self.table(world, table))
        })
    }

    /// The projector's file. Each event of the type `Measure` records how many statements the
    /// session has run so far.
    async fn file(self, world: &World, case: &Case) -> Folder {
        let name = self.name();
        let mut text = format!("name = '{name}'\nversion = 1\nmode = 'from_beginning'\n");
        let status = if is_mariadb().await { "information_schema" } else { "performance_schema" };
        let measure = format!(
            "insert into measured select '{name}', :position, variable_value \
             from {status}.session_status \
             where variable_name = 'Questions'"
        );
        let measure = [("'Measure'", measure)];
        for (events, sql) in case.handlers.iter().chain(&measure) {
            let sql = self.sql(world, sql);
            write!(text, "\n[[on]]\nevents = [{events}]\nsql = '''{sql}'''\n")
                .expect("writing to a string succeeds");
        }
        Folder::new().with("projector.toml", &text)
    }

    async fn registry(self, world: &World, case: &Case) -> (Folder, Registry) {
        world
            .execute(
                "create table if not exists measured (way varchar(20), position bigint, \
                 statements bigint)",
            )
            .await;
        for sql in &case.setup {
            world.execute(&self.sql(world, sql)).await;
        }
        let folder = self.file(world, case).await;
        let mut registry = Registry::new();
        load(folder.path().as_ref(), &mut registry).expect("the file is valid");
        (folder, registry)
    }

    async fn boot(self, world: &World, case: &Case) -> Outcome {
        let (folder, registry) = self.registry(world, case).await;
        let limits = Limits::default().with_batch(1000);
        boot(&world.database, &registry, limits, |_| {}).await.expect("boot succeeds");
        self.outcome(world, &folder).await
    }

    async fn outcome(self, world: &World, folder: &Folder) -> Outcome {
        let entry = world.entry(self.name()).await.expect("the projector is in the ledger");
        let failure = match &entry.status {
            projectionist::Status::Broken(failure) => Some(
                failure
                    .error
                    .replace(folder.path(), "")
                    .replace(&format!("{}.", world.database_name), "")
                    .replace("together_", "")
                    .replace("alone_", ""),
            ),
            _ => None,
        };
        let mut rows = Vec::new();
        for table in ["a", "b", "c"] {
            rows.extend(contents(world, self.name(), table).await);
        }
        Outcome { status: entry.status.to_string(), position: entry.position.get(), failure, rows }
    }
}

/// The rows of a table, each as one text with the table's letter, sorted. Empty if the table does
/// not exist.
async fn contents(world: &World, way: &str, table: &str) -> Vec<String> {
    let mut connection = world.connection().await;
    let columns: Option<String> = sqlx::query_scalar(
        "select group_concat(concat('quote(`', column_name, '`)') order by column_name) \
         from information_schema.columns \
         where table_schema = database() and table_name = ?",
    )
    .bind(format!("{way}_{table}"))
    .fetch_one(&mut connection)
    .await
    .expect("the columns");
    let Some(columns) = columns else { return Vec::new() };
    let sql = format!(
        "select convert(concat_ws(',', '{table}', {columns}) using utf8mb4) from {way}_{table}"
    );
    let mut rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(sql))
        .fetch_all(&mut connection)
        .await
        .expect("the rows are readable");
    rows.sort();
    rows
}

/// The number of statements that a projector's session ran between its first and its last event.
async fn statements(world: &World, way: InsertMode) -> u64 {
    let sql = format!(
        "select cast(max(statements) - min(statements) as unsigned) from measured where way = '{}' \
         having count(*) = 2",
        way.name()
    );
    // The last measurement is itself a statement.
    world.number(&sql).await - 1
}

fn of_type(event_type: &str, number: usize) -> NewEvent {
    NewEvent { event_type: event_type.into(), ..event(number) }
}

/// Appends these events between two `Measure` events.
async fn append(world: &World, events: Vec<NewEvent>) {
    let measure = NewEvent {
        payload: r#"{"number":0,"n":0,"s":null,"g":0}"#.into(),
        ..of_type("Measure", 0)
    };
    let mut all = vec![measure.clone()];
    all.extend(events);
    all.push(measure);
    world.store.append(&all).await.expect("the events are appended");
}

/// Boots a projector over 120 events in both modes and asserts that the results are equal. Returns
/// how many statements each mode took.
async fn compare_with_row_by_row(case: &Case) -> (u64, u64) {
    let world = World::new().await;
    append(&world, (0..120).map(event).collect()).await;
    let alone = InsertMode::RowByRow.boot(&world, case).await;
    assert_eq!((alone.status.as_str(), alone.position), ("live", 122), "{alone:?}");
    assert!(!alone.rows.is_empty(), "the projector has written no row");
    assert_eq!(InsertMode::Coalesced.boot(&world, case).await, alone);
    (
        statements(&world, InsertMode::Coalesced).await,
        statements(&world, InsertMode::RowByRow).await,
    )
}

const A: &str =
    "create table <a> (k varchar(40) primary key, n bigint not null, s varchar(8) null)";
const B: &str =
    "create table <b> (k varchar(40) primary key, n bigint not null, s varchar(8) null)";
const C: &str =
    "create table <c> (k varchar(40) primary key, n bigint not null, s varchar(8) null)";

/// The statement that reads the properties of the tables.
const TABLE_QUERIES: u64 = 1;

const COUNT: &str =
    "insert into <a> (k, n) values (:stream_id, 1) on duplicate key update n = n + values(n)";

#[tokio::test]
async fn inserts_of_one_handler_are_sent_together() {
    let handlers = [
        COUNT,
        "insert ignore into <b> (k, n, s) values (concat(:stream_id, '-', :payload.number), \
         :position, :payload.s?)",
        "replace into <c> values (:stream_id, :payload.number, null)",
    ];
    let (together, alone) = compare_with_row_by_row(&Case::new(&[A, B, C], &handlers)).await;
    // The first row of each table, then the other 119. One statement inspects all three tables.
    assert_eq!((together, alone), (3 * (1 + 1) + TABLE_QUERIES, 3 * 120));
}

#[tokio::test]
async fn a_statement_between_inserts_on_the_same_table_keeps_its_place() {
    let update = "update <a> set n = n * 3 % 1009 where k = :stream_id";
    let (together, alone) = compare_with_row_by_row(&Case::new(&[A], &[COUNT, update])).await;
    assert_eq!((together, alone), (240 + TABLE_QUERIES, 240));
    // Another insert into the same table also keeps its place.
    let other =
        "insert into <a> (k, n) values (:stream_id, 2) on duplicate key update n = n * 3 % 1009";
    let (together, alone) = compare_with_row_by_row(&Case::new(&[A], &[COUNT, other])).await;
    assert_eq!((together, alone), (240 + TABLE_QUERIES, 240));
    // An insert into another table that reads this one also keeps its place.
    let reading = "insert into <b> select concat('at ', :position), sum(n), null from <a>";
    let (together, alone) = compare_with_row_by_row(&Case::new(&[A, B], &[COUNT, reading])).await;
    assert_eq!((together, alone), (240 + TABLE_QUERIES, 240));
}

/// Statements with the same number of rows are repeated, with values of other types in the same
/// places.
#[tokio::test]
async fn a_value_binds_the_same_whatever_rows_surround_it() {
    const VALUES: &[&str] = &[
        "10.5",
        "\"00123\"",
        "12345678901234567.891",
        "null",
        "7",
        "\"a\"",
        "true",
        "\"1e2\"",
        "-0.25",
        "18446744073709551617",
    ];
    let world = World::new().await;
    let mut dice = fastrand::Rng::with_seed(seed());
    let mut events = Vec::new();
    for run in 0..60 {
        let value = VALUES[dice.usize(..VALUES.len())];
        for number in 0..dice.usize(1..10) {
            let value = if dice.u8(..10) == 0 { "null" } else { value };
            events.push(NewEvent { payload: format!(r#"{{"v":{value}}}"#), ..event(3 * number) });
        }
        if run % 3 == 2 {
            events.push(of_type("Pause", 0));
        }
    }
    append(&world, events).await;
    let table = "create table <a> (k bigint primary key, v varchar(40) collate utf8mb4_bin null, \
                 w text collate utf8mb4_bin)";
    let sql = "insert into <a> values (:position, :payload.v, concat('<', coalesce(:payload.v, \
               :payload), '>'))";
    let mut case = Case::new(&[table], &[]);
    case.handlers = vec![("'Opened'", sql.to_owned()), ("'Pause'", "do 1".to_owned())];
    let together = InsertMode::Coalesced.boot(&world, &case).await;
    assert_eq!(together.status, "live", "{together:?}");
    assert_eq!(together, InsertMode::RowByRow.boot(&world, &case).await);
    assert!(
        statements(&world, InsertMode::Coalesced).await
            < statements(&world, InsertMode::RowByRow).await
    );
}

#[tokio::test]
async fn a_table_with_a_trigger_is_written_row_by_row() {
    let trigger = "create trigger <way>_trigger after insert on <b> for each row \
                   insert into <c> select concat('at ', new.k), count(*), null from <a>";
    let handlers = [
        "insert into <b> (k, n) values (:position, 1)",
        "insert into <a> (k, n) values (:position, 1)",
    ];
    let (together, alone) =
        compare_with_row_by_row(&Case::new(&[A, B, C, trigger], &handlers)).await;
    assert_eq!((together, alone), (240 + TABLE_QUERIES, 240));
}

#[tokio::test]
async fn an_insert_that_must_be_batched_stops_boot_with_file_line_and_reason() {
    let world = World::new().await;
    world.execute("create table a (k varchar(40) primary key, n int)").await;
    world.execute("create trigger a_trigger before insert on a for each row set new.n = 1").await;
    world.append(3).await;
    let text = |batch: &str| {
        format!(
            "name = 'a'\nversion = 1\nmode = 'from_beginning'\n[[on]]\nevents = ['*']\n{batch}\n\
             sql = 'insert into a values (:position, 0)'\n"
        )
    };
    let folder = Folder::new().with("a.toml", &text("batch = true"));
    let ran = world.run(&["boot", "--projectors", folder.path()]).await.exits(1);
    assert!(
        ran.stderr.contains("a.toml:4: table a: it has a trigger. The file has `batch = true`"),
        "{}",
        ran.stderr
    );
    // Without the key, the reason is a log line of boot and a note of doctor.
    let folder = Folder::new().with("a.toml", &text(""));
    let ran = world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    for part in ["one by one: ", "a.toml:4", "it has a trigger"] {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
    let doctor = world.run(&["doctor", "--projectors", folder.path()]).await;
    assert!(doctor.stdout.contains("a.toml:4: table a: it has a trigger"), "{}", doctor.stdout);
}

#[tokio::test]
async fn a_table_with_a_foreign_key_is_written_row_by_row() {
    let child = "create table <b> (k varchar(40) primary key, foreign key (k) references <a> (k))";
    let handlers = [
        "insert into <a> (k, n) values (:position, 1)",
        "insert into <b> (k) values (cast(:position as char))",
    ];
    let (together, alone) = compare_with_row_by_row(&Case::new(&[A, child], &handlers)).await;
    assert_eq!((together, alone), (240 + TABLE_QUERIES, 240));
}

#[tokio::test]
async fn a_table_with_auto_increment_or_a_computed_default_is_written_row_by_row() {
    let numbered = "create table <a> (seq bigint auto_increment primary key, k varchar(40) unique, \
                    n int not null)";
    let (together, alone) = compare_with_row_by_row(&Case::new(&[numbered], &[COUNT])).await;
    assert_eq!((together, alone), (120 + TABLE_QUERIES, 120));

    // The columns get different values each time, so only the number of statements is compared.
    for column in [
        "at datetime(6) default now(6)",
        "at timestamp(6) null on update now(6)",
        "r double default (rand())",
    ] {
        let world = World::new().await;
        append(&world, (0..40).map(event).collect()).await;
        let table =
            format!("create table <a> (k varchar(40) primary key, n int not null, {column})");
        let booted = InsertMode::Coalesced.boot(&world, &Case::new(&[&table], &[COUNT])).await;
        assert_eq!(
            (booted.status.as_str(), statements(&world, InsertMode::Coalesced).await),
            ("live", 40 + TABLE_QUERIES),
            "{column}"
        );
    }
    // Constant defaults do not prevent coalescing.
    let constant = "create table <a> (k varchar(40) primary key, n int not null default 0, \
                    s varchar(9) default 'it''s', \
                    d decimal(5, 2) default -1.5, b bit(2) default b'11', \
                    t datetime default '2020-01-01 00:00:00', \
                    g int generated always as (n + 1) stored, check (n > 0))";
    let (together, alone) = compare_with_row_by_row(&Case::new(&[constant], &[COUNT])).await;
    assert_eq!((together, alone), (1 + 1 + TABLE_QUERIES, 120));
}

/// On MariaDB, `insert ignore` of one row that violates a constraint is an error. `insert ignore`
/// of many rows skips that row.
#[tokio::test]
async fn an_insert_ignore_with_a_constraint_is_written_row_by_row() {
    for (column, value) in [
        ("n bigint, check (n <> 100)", ":payload.number"),
        ("n bigint check (n < 100)", ":payload.number"),
        ("n json", "if(:payload.number = 100, 'x', '1')"),
    ] {
        let world = World::new().await;
        append(&world, (0..120).map(event).collect()).await;
        let table = format!("create table <a> (k varchar(40) primary key, {column})");
        let insert = format!(
            "insert ignore into <a> (k, n) values (concat(:stream_id, '-', :payload.number), \
             {value})"
        );
        let case = Case::new(&[&table], &[&insert]);
        let alone = InsertMode::RowByRow.boot(&world, &case).await;
        // On MySQL, `ignore` does not apply to JSON.
        let breaks = is_mariadb().await || column == "n json";
        assert_eq!(alone.status, if breaks { "broken" } else { "live" }, "{column}: {alone:?}");
        assert_eq!(InsertMode::Coalesced.boot(&world, &case).await, alone, "{column}");
    }
    // Other tests show that such inserts are coalesced if the table has no constraint.
}

#[tokio::test]
async fn views_and_non_transactional_tables_are_written_row_by_row() {
    let view = "create view <b> as select * from <a>";
    let through = "insert into <b> (k, n) values (:position, 1)";
    let (together, alone) = compare_with_row_by_row(&Case::new(&[A, view], &[through])).await;
    assert_eq!((together, alone), (120 + TABLE_QUERIES, 120));
    let (together, alone) =
        compare_with_row_by_row(&Case::new(&[&format!("{A} engine = MyISAM")], &[COUNT])).await;
    assert_eq!((together, alone), (120 + TABLE_QUERIES, 120));
}

#[tokio::test]
async fn a_projector_that_reads_the_previous_result_is_written_row_by_row() {
    let looking = "update <b> set n = n + row_count() where k = 'rows'";
    let rows = format!("{B} select 'rows' as k, 0 as n, null as s");
    let (together, alone) =
        compare_with_row_by_row(&Case::new(&[A, &rows], &[COUNT, looking])).await;
    // Each of 121 events begins with two statements that reset `row_count()` and
    // `last_insert_id()`.
    assert_eq!((together, alone), (240 + 242, 240 + 242));

    let numbered = "create table <b> (seq bigint auto_increment primary key, k varchar(40))";
    let handlers = [
        "insert into <b> (k) values (:stream_id)",
        COUNT,
        "insert into <c> values (:position, last_insert_id(), null)",
    ];
    let (together, alone) = compare_with_row_by_row(&Case::new(&[A, numbered, C], &handlers)).await;
    assert_eq!((together, alone), (360 + 242, 360 + 242));
}

#[tokio::test]
async fn a_user_without_the_trigger_grant_writes_row_by_row_and_is_warned_once() {
    let world = World::new().await;
    append(&world, (0..120).map(event).collect()).await;
    let case = Case::new(&[A], &[COUNT]);
    let (folder, _) = InsertMode::Coalesced.registry(&world, &case).await;
    let user = format!("u{:x}", fastrand::u64(..));
    let mut admin = world.connection().await;
    execute(&mut admin, &format!("create user '{user}'@'%' identified by 'only-for-this'")).await;
    execute(
        &mut admin,
        &format!("grant select, insert, update on {}.* to '{user}'@'%'", world.database_name),
    )
    .await;
    let url = world.database_url.replace("://root@", &format!("://{user}:only-for-this@"));
    let boot = ["boot", "--projectors", folder.path(), "--database-url", &url];

    let ran = world.run(&boot).await.exits(0);
    assert_eq!(statements(&world, InsertMode::Coalesced).await, 120 + TABLE_QUERIES);
    assert_eq!(
        ran.stderr.matches("grant trigger and insert on the table").count(),
        1,
        "{}",
        ran.stderr
    );

    // With the grant on that table alone, the inserts are coalesced.
    execute(
        &mut admin,
        &format!("grant trigger, insert on {}.together_a to '{user}'@'%'", world.database_name),
    )
    .await;
    for table in ["projectors", "together_a", "measured"] {
        world.execute(&format!("delete from {table}")).await;
    }
    let ran = world.run(&boot).await.exits(0);
    execute(&mut admin, &format!("drop user '{user}'@'%'")).await;
    assert_eq!(
        statements(&world, InsertMode::Coalesced).await,
        1 + 1 + TABLE_QUERIES,
        "{}",
        ran.stderr
    );
}

#[tokio::test]
async fn an_event_that_fails_among_coalesced_rows_is_found_with_file_and_line() {
    let long = "insert into <b> (k, n, s) values (:position, 1, :payload.s?)";
    for (poison, reason) in [
        (r#"{"s":"too long by far"}"#, "Data too long"),
        (r#"{"s":1,"number":"no number"}"#, "ncorrect"),
        (r#"{"s":1,"number":null}"#, "cannot be null"),
        (r#"{"s":1}"#, "`:payload.number` is missing"),
    ] {
        let world = World::new().await;
        let mut events: Vec<NewEvent> = (0..100).map(event).collect();
        events[69].payload = poison.into();
        append(&world, events).await;
        let case = Case::new(
            &[A, B],
            &[long, "insert into <a> (k, n) values (:position, :payload.number)"],
        );
        let alone = InsertMode::RowByRow.boot(&world, &case).await;
        let failure = alone.failure.as_deref().unwrap_or_default();
        let line = if reason == "Data too long" { "projector.toml:5" } else { "projector.toml:9" };
        assert!(failure.contains(reason) && failure.contains(line), "{failure}");
        assert_eq!((alone.position, alone.rows.len()), (70, 69 * 2));
        assert_eq!(InsertMode::Coalesced.boot(&world, &case).await, alone);
    }
}

#[tokio::test]
async fn no_trigger_can_be_created_while_rows_are_pending() {
    let world = World::new().await;
    let mut events: Vec<NewEvent> = (0..100).map(event).collect();
    events.insert(50, of_type("Pause", 0));
    append(&world, events).await;
    let mut case = Case::new(&[A], &[COUNT]);
    case.handlers.push(("'Pause'", "update gate set n = n + 1".into()));
    world.execute("create table gate (n int) engine = InnoDB select 1 as n").await;
    let mut other = world.connection().await;
    execute(&mut other, "begin; update gate set n = 2").await;

    let booting = InsertMode::Coalesced.boot(&world, &case);
    let creating_trigger = async {
        let waits = |session: &Session| session.statement.starts_with("update gate");
        eventually("the handler waits", async || world.sessions().await.iter().any(waits)).await;
        let mut other_session = world.connection().await;
        execute(&mut other_session, "set session lock_wait_timeout = 1").await;
        let trigger =
            "create trigger late before insert on together_a for each row set new.n = 1000";
        let refused = sqlx::raw_sql(trigger)
            .execute(&mut other_session)
            .await
            .expect_err("the table is in use");
        assert!(refused.to_string().contains("Lock wait timeout"), "{refused}");
        execute(&mut other, "rollback").await;
    };
    let (booted, ()) = tokio::join!(booting, creating_trigger);
    assert_eq!(
        (booted.status.as_str(), statements(&world, InsertMode::Coalesced).await),
        ("live", 1 + TABLE_QUERIES + 1 + 1 + 1)
    );
}

/// A handler of a random file.
#[derive(Debug, Clone)]
struct RandomHandler {
    statement: &'static str,
    tables: (usize, usize),
    types: &'static str,
}

/// `<t>` and `<u>` stand for any of the tables, `<i>` for the handler's number. Shrinking prefers
/// the first entries.
const INSERTS: &[&str] = &[
    "insert into <t> (k, n) values (:stream_id, 1) on duplicate key update n = n + values(n)",
    "insert into <t> (k, n, s) values (:stream_id, :payload.n, :payload.s?) \
     on duplicate key update n = (n * 3 + values(n)) % 100003, s = coalesce(values(s), <t>.s)",
    "insert ignore into <t> (k, n, s) values (concat(:stream_id, '-', :payload.g), :payload.n, \
     left(:payload.s?, 8))",
    "insert ignore into <t> (k, n, s) values (:payload.g, :position, :payload.s?)",
    "replace into <t> values (:payload.g, :position, :payload.s?)",
    "insert into <t> (k, n, s) values (concat(right(:event_id, 20), '<i>'), \
     cast(:payload.n as decimal(20, 3)), :payload.g)",
    "insert into <t> (k, n) values (:position, :payload.n) on duplicate key update k = concat(k, \
     '+'), n = null",
    "insert into <t> (k, n) values (concat_ws('.', :payload.g, :position % 150, '<i>'), \
     :payload.n)",
];

/// Statements that run between the rows of the inserts.
const OTHERS: &[&str] = &[
    "update <t> set n = n * 2 % 100003 where k = concat(:payload.g)",
    "update <t> set n = n + 1, s = 'x' where k like '%1%'",
    "delete from <t> where k = :stream_id",
    "insert into <t> (k, n) select concat('sum-', :position), coalesce(sum(n), 0) % 100003 \
     from <u> \
     on duplicate key update s = '='",
    "insert into <t> (k, n) values (:stream_id, (select count(*) from (select k \
     from <u> limit 100000) as other)) \
     on duplicate key update s = '#'",
];

const TYPES: &[&str] = &["'*'", "'Opened'", "'Opened', 'Closed'", "'Amended', 'Closed'"];

/// JSON values: the first list has one type, the second several types, the third values that break
/// most statements.
const NUMBERS: [&[&str]; 3] = [
    &["1", "0", "-7", "12345678901", "4"],
    &["2.5", "\"12\"", "\"3.25\"", "true", "1e2", "5"],
    &["null", "\"none\""],
];
const SHORT: [&[&str]; 3] = [
    &["\"a\"", "null", "\"\"", "\"größe\""],
    &["1", "1.5", "false", "\"00123\""],
    &["\"far too long\""],
];
const KEYS: [&[&str]; 3] = [
    &["1", "2", "30", "10"],
    &["\"1\"", "\"x\"", "1.5", "\"01\"", "\"case-1\""],
    &["\"😀\"", "true"],
];

fn random_handler() -> impl Strategy<Value = RandomHandler> {
    let any = || (0..TYPES.len()).prop_map(|at| TYPES[at]);
    let insert = ((0..INSERTS.len()).prop_map(|at| INSERTS[at]), any());
    let other =
        ((0..OTHERS.len()).prop_map(|at| OTHERS[at]), prop_oneof![5 => Just("'Rare'"), 1 => any()]);
    (prop_oneof![4 => insert, 1 => other], (0..3_usize, 0..3_usize))
        .prop_map(|((statement, types), tables)| RandomHandler { statement, tables, types })
}

/// Mostly picks from the first list, so that rows can be coalesced. `seldom` is the weight of the
/// first list against one of the last.
fn one_of(
    values: [&'static [&'static str]; 3],
    seldom: u32,
) -> impl Strategy<Value = &'static str> {
    let [plain, odd, last] = values.map(|values| (0..values.len()).prop_map(|at| values[at]));
    prop_oneof![seldom => plain, seldom / 20 + 1 => odd, 1 => last]
}

fn random_event() -> impl Strategy<Value = NewEvent> {
    (0..30_usize, 0..25_usize, one_of(NUMBERS, 1000), one_of(SHORT, 1000), one_of(KEYS, 40))
        .prop_map(|(number, rare, n, s, g)| {
            let event = if rare == 24 { of_type("Rare", number) } else { event(number) };
            NewEvent { payload: format!(r#"{{"n":{n},"s":{s},"g":{g}}}"#), ..event }
        })
}

async fn compare(
    handlers: Vec<RandomHandler>,
    events: Vec<NewEvent>,
    tally: &mut CaseCounts,
) -> Result<(), TestCaseError> {
    let world = World::new().await;
    append(&world, events).await;
    let letter = |table: usize| ["<a>", "<b>", "<c>"][table];
    let binary = |sql: &str| sql.replace("varchar(40)", "varchar(40) collate utf8mb4_bin");
    let case = Case {
        setup: [A, B, C].map(binary).to_vec(),
        handlers: handlers
            .iter()
            .enumerate()
            .map(|(number, wild)| {
                let (t, u) = wild.tables;
                let sql = wild.statement.replace("<t>", letter(t)).replace("<u>", letter(u));
                (wild.types, sql.replace("<i>", &number.to_string()))
            })
            .collect(),
    };
    let alone = InsertMode::RowByRow.boot(&world, &case).await;
    let together = InsertMode::Coalesced.boot(&world, &case).await;
    prop_assert_eq!(&together, &alone);
    tally.cases += 1;
    tally.broken += u32::from(alone.failure.is_some());
    if alone.failure.is_none() {
        tally.together += statements(&world, InsertMode::Coalesced).await;
        tally.alone += statements(&world, InsertMode::RowByRow).await;
    }
    Ok(())
}

/// Counts over the random cases. They prove that the cases were not trivial.
#[derive(Debug, Default)]
struct CaseCounts {
    cases: u32,
    broken: u32,
    together: u64,
    alone: u64,
}

#[test]
fn random_files_and_logs_give_the_same_tables_with_coalesced_inserts() {
    let seed = seed();
    let bytes: Vec<u8> = seed.to_le_bytes().repeat(4);
    let config =
        Config { cases: 16, max_shrink_iters: 40, failure_persistence: None, ..Config::default() };
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("the runtime starts");
    let tally = std::cell::RefCell::new(CaseCounts::default());
    let strategy = (vec(random_handler(), 1..5), vec(random_event(), 35..160));
    let result = runner.run(&strategy, |(handlers, events)| {
        runtime.block_on(compare(handlers, events, &mut tally.borrow_mut()))
    });
    if let Err(TestError::Fail(reason, (handlers, events))) = &result {
        let payloads: Vec<&str> = events.iter().map(|event| event.payload.as_str()).collect();
        panic!("{reason}\n{handlers:#?}\n{payloads:?}");
    }
    result.expect("no case is rejected");
    let tally = tally.into_inner();
    eprintln!("{tally:?}");
    assert!(tally.broken < tally.cases, "{tally:?}");
    assert!(tally.together * 10 < tally.alone * 9, "too few inserts were coalesced: {tally:?}");
}

/// A projector in Rust that does the same as [`COUNT`].
struct MultiRowCounter;

#[async_trait]
impl Projector for MultiRowCounter {
    fn name(&self) -> &str {
        "by_hand"
    }

    fn event_types(&self) -> EventTypes {
        EventTypes::only(["Opened", "Amended", "Closed"])
    }

    async fn handle_batch(
        &self,
        events: &[&Event],
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        let mut rows = MultiRowInsert::new("insert into alone_b (k, n, s) values")
            .with_tail("on duplicate key update n = n + values(n), s = values(s)");
        for event in events {
            rows.row()
                .bind(event.stream_id())
                .bind(1)
                .bind(Some("odd").filter(|_| event.position().get() % 2 == 1));
        }
        assert_eq!(rows.len(), events.len());
        let affected = rows.execute(db).await?;
        assert!(
            rows.is_empty() && affected >= events.len() as u64,
            "the affected rows are counted as the server counts them"
        );
        Ok(())
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.handle_batch(&[event], db).await
    }
}

#[tokio::test]
async fn the_multi_row_helper_equals_a_statement_per_row() {
    let world = World::new().await;
    append(&world, (0..700).map(event).collect()).await;
    let s = "case when :position % 2 = 1 then 'odd' end";
    let count = format!(
        "insert into <a> (k, n, s) values (:stream_id, 1, {s}) on duplicate key \
         update n = n + values(n), s = values(s)"
    );
    let Outcome { rows, .. } = InsertMode::RowByRow.boot(&world, &Case::new(&[A], &[&count])).await;
    world.execute("create table alone_b like alone_a").await;
    let mut registry = Registry::new();
    registry.add(MultiRowCounter).expect("the name is unique");
    assert!(world.boot(&registry).await.is_released());
    let by_hand = contents(&world, "alone", "b").await;
    assert_eq!(by_hand.iter().map(|row| row.replacen('b', "a", 1)).collect::<Vec<_>>(), rows);
}

#[tokio::test]
async fn the_multi_row_helper_reports_bad_input_before_any_query() {
    let world = World::new().await;
    let db = &mut world.connection().await;
    let mut none = MultiRowInsert::new("insert into nowhere values");
    assert_eq!(none.execute(db).await.expect("an empty insert succeeds"), 0);

    let mut ragged = MultiRowInsert::new("insert into nowhere values");
    ragged.row().bind(1).bind(2).row().bind(3);
    let error = ragged.execute(db).await.expect_err("the insert is rejected").to_string();
    assert!(error.contains("different numbers of values") && error.contains("nowhere"), "{error}");

    let mut outside = MultiRowInsert::new("insert into nowhere values")
        .with_tail("on duplicate key update a = ?");
    outside.row().bind(1);
    let error = outside.execute(db).await.expect_err("the insert is rejected").to_string();
    assert!(error.contains("a ? is outside of them"), "{error}");
}
