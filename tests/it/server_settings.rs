//! Global settings of the server: each one is harmless, or is refused with an error that names it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_sqs::types::QueueAttributeName;
use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection, Row};
use projectionist::time::OffsetDateTime;
use projectionist::{
    Database, Event, EventStore, Limits, NewEvent, PlaySettings, Projector, Registry,
    RelaySettings, SqsQueue, async_trait, boot, play,
};
use tokio::time::timeout;

use crate::support::{
    Folder, OwnServer, RunningProcess, connect, execute, server_error, sqs_client, without_tls,
};

/// The effect of a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Every read model equals the fold of the log.
    Harmless,
    /// Refused for every user, with an error that names the setting.
    Refused,
    /// Refused for an ordinary user. A user who may change the setting in a session can work.
    RefusedUnlessPrivileged,
    /// [`Outcome::Harmless`], even if a handler is silent, or runs a statement, for longer than the
    /// setting allows.
    HarmlessToSlowHandlers,
}
use Outcome::{Harmless, HarmlessToSlowHandlers, Refused, RefusedUnlessPrivileged};

/// Global settings, their values and the outcomes. A variable that the server does not have is
/// skipped.
#[rustfmt::skip]
const SETTINGS: &[(&str, &str, Outcome)] = &[
    // Transactions.
    ("autocommit", "0", Harmless),
    ("completion_type", "1", Harmless),
    ("completion_type", "2", Harmless),
    ("transaction_isolation", "'READ-UNCOMMITTED'", Harmless),
    ("transaction_isolation", "'READ-COMMITTED'", Harmless),
    ("transaction_isolation", "'REPEATABLE-READ'", Harmless),
    ("transaction_isolation", "'SERIALIZABLE'", Harmless),
    ("tx_isolation", "'READ-UNCOMMITTED'", Harmless),
    ("tx_isolation", "'SERIALIZABLE'", Harmless),
    ("transaction_read_only", "1", Harmless),
    ("tx_read_only", "1", Harmless),
    ("innodb_snapshot_isolation", "1", Harmless),
    ("read_only", "1", Refused),
    ("super_read_only", "1", Refused),
    // Limits on what a statement reads or writes.
    ("sql_select_limit", "10", Harmless),
    ("max_join_size", "100", Harmless),
    ("sql_big_selects", "0", Harmless),
    ("sql_safe_updates", "1", Harmless),
    ("max_allowed_packet", "1024", Refused),
    ("max_allowed_packet", "16384", Refused),
    ("max_allowed_packet", "65536", Harmless),
    ("max_error_count", "0", Harmless),
    ("max_prepared_stmt_count", "0", Refused),
    ("group_concat_max_len", "4", Harmless),
    ("max_sort_length", "64", Harmless),
    ("cte_max_recursion_depth", "3", Harmless),
    ("max_recursive_iterations", "3", Harmless),
    // Time limits.
    ("innodb_lock_wait_timeout", "1", Harmless),
    ("lock_wait_timeout", "1", Harmless),
    ("wait_timeout", "1", HarmlessToSlowHandlers),
    ("interactive_timeout", "1", Harmless),
    ("net_read_timeout", "1", Harmless),
    ("net_write_timeout", "1", Harmless),
    ("max_statement_time", "0.05", HarmlessToSlowHandlers),
    ("max_execution_time", "50", HarmlessToSlowHandlers),
    ("idle_transaction_timeout", "1", HarmlessToSlowHandlers),
    ("idle_readonly_transaction_timeout", "1", HarmlessToSlowHandlers),
    ("idle_write_transaction_timeout", "1", HarmlessToSlowHandlers),
    // The meaning of SQL.
    ("sql_mode", "''", Harmless),
    ("sql_mode", "'ANSI_QUOTES'", Harmless),
    ("sql_mode", "'NO_BACKSLASH_ESCAPES'", Harmless),
    ("sql_mode", "'PIPES_AS_CONCAT'", Harmless),
    ("sql_mode", "'TRADITIONAL'", Harmless),
    ("sql_mode", "'NO_AUTO_VALUE_ON_ZERO'", Harmless),
    ("sql_mode", "'PAD_CHAR_TO_FULL_LENGTH'", Harmless),
    (
        "sql_mode",
        "'HIGH_NOT_PRECEDENCE,NO_UNSIGNED_SUBTRACTION,IGNORE_SPACE,REAL_AS_FLOAT'",
        Harmless,
    ),
    ("sql_mode", "'ORACLE'", Harmless),
    ("sql_mode", "'EMPTY_STRING_IS_NULL,TIME_ROUND_FRACTIONAL'", Harmless),
    ("old_mode", "'NO_DUP_KEY_WARNINGS_WITH_IGNORE,ZERO_DATE_TIME_CAST'", Harmless),
    ("sql_if_exists", "1", Harmless),
    ("sql_auto_is_null", "1", Harmless),
    ("standard_compliant_cte", "0", Harmless),
    ("div_precision_increment", "0", Harmless),
    ("default_week_format", "3", Harmless),
    ("lc_time_names", "'de_DE'", Harmless),
    ("lc_messages", "'de_DE'", Harmless),
    ("default_regex_flags", "'EXTENDED'", Harmless),
    ("block_encryption_mode", "'aes-256-ecb'", Harmless),
    ("windowing_use_high_precision", "0", Harmless),
    ("system_versioning_asof", "'2020-01-01 00:00:00'", Harmless),
    ("time_zone", "'+05:00'", Harmless),
    // Text.
    ("character_set_server", "'latin1'", Harmless),
    ("character_set_client", "'latin1'", Harmless),
    ("character_set_connection", "'latin1'", Harmless),
    ("character_set_results", "'latin1'", Harmless),
    ("character_set_results", "'utf16'", Harmless),
    ("collation_connection", "'utf8mb4_bin'", Harmless),
    ("collation_server", "'latin1_bin'", Harmless),
    ("default_collation_for_utf8mb4", "'utf8mb4_general_ci'", Harmless),
    ("character_set_collations", "'utf8mb4=utf8mb4_bin'", Harmless),
    // Checks.
    ("foreign_key_checks", "0", Harmless),
    ("unique_checks", "0", Harmless),
    ("check_constraint_checks", "0", Harmless),
    ("sql_notes", "0", Harmless),
    ("sql_warnings", "1", Harmless),
    ("innodb_strict_mode", "0", Harmless),
    // Tables.
    ("explicit_defaults_for_timestamp", "0", Harmless),
    ("default_storage_engine", "'MyISAM'", Harmless),
    ("default_storage_engine", "'MEMORY'", Harmless),
    ("default_tmp_storage_engine", "'MyISAM'", Harmless),
    ("enforce_storage_engine", "'MyISAM'", RefusedUnlessPrivileged),
    ("enforce_storage_engine", "'InnoDB'", Harmless),
    ("sql_require_primary_key", "1", Harmless),
    ("sql_generate_invisible_primary_key", "1", Harmless),
    ("innodb_default_row_format", "'compact'", Refused),
    // Generated numbers.
    ("auto_increment_increment", "2", Refused),
    ("auto_increment_offset", "2", Harmless),
    // The execution of statements, and other behaviour of the server.
    ("optimizer_switch", "'derived_merge=off'", Harmless),
    ("optimizer_switch", "'index_merge=off,materialization=off,semijoin=off'", Harmless),
    ("query_cache_type", "1", Harmless),
    ("low_priority_updates", "1", Harmless),
    ("sql_buffer_result", "1", Harmless),
    ("big_tables", "1", Harmless),
    ("tmp_table_size", "1024", Harmless),
    ("updatable_views_with_limit", "0", Harmless),
    ("event_scheduler", "1", Harmless),
    ("log_bin_trust_function_creators", "1", Harmless),
    ("profiling", "1", Harmless),
    ("explain_format", "'JSON'", Harmless),
    ("session_track_system_variables", "'*'", Harmless),
    // Statements that a session runs first, unless its user is an administrator.
    ("init_connect", "'set timestamp = 1'", Harmless),
    ("init_connect", "'set sql_select_limit = 10'", Harmless),
    ("init_connect", "'set @x = 1, names latin1'", Harmless),
    ("init_connect", "'set autocommit = 0'", Harmless),
    ("init_connect", "'set insert_id = 100000'", Refused),
    ("init_connect", "'start transaction read only'", Harmless),
    ("init_connect", "'set transaction read only'", Harmless),
    ("init_connect", "'set session transaction isolation level read uncommitted'", Harmless),
];

/// At least this many settings must have been tried.
const MIN_TRIED: usize = 60;

const BOOT_EVENTS: usize = 150;
const PLAY_EVENTS: usize = 30;

/// A run under a harmless setting takes about a second.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

/// Longer than every time limit in [`SETTINGS`].
const SILENCE: Duration = Duration::from_millis(1_200);

/// Rows as text, by table.
type Models = BTreeMap<&'static str, Vec<String>>;

#[tokio::test]
async fn each_global_setting_is_harmless_or_refused_with_its_name() {
    let server = OwnServer::start().await;
    let bench = SettingsBench::new(&server).await;
    let untouched = bench.run(None, AppUser::Ordinary).await.expect("the run succeeds");
    assert_folded(&untouched);
    let (mut tried, mut wrong) = (0, String::new());
    let began = Instant::now();
    for &(name, value, outcome) in SETTINGS {
        if !bench.has_setting(name, value).await {
            continue;
        }
        tried += 1;
        // For `init_connect`, the error names the variable that the statement sets.
        let variable =
            value.split([' ', '\'']).nth(2).filter(|_| name == "init_connect").unwrap_or(name);
        let setting = Setting { name, value, is_slow: outcome == HarmlessToSlowHandlers };
        // The server's own error names `--read-only` for both variables.
        let variable = variable.trim_start_matches("super_");
        let is_named =
            |error: &String| error.replace("--read-only", "read_only").contains(variable);
        let is_refused = |run: &Result<Models, String>| run.as_ref().is_err_and(is_named);
        let is_harmless = |run: &Result<Models, String>| run.as_ref() == Ok(&untouched);
        let ordinary = bench.run(Some(setting), AppUser::Ordinary).await;
        let mut results = vec![describe(&ordinary, &untouched)];
        let is_right = match outcome {
            Harmless | HarmlessToSlowHandlers => is_harmless(&ordinary),
            Refused => is_refused(&ordinary),
            RefusedUnlessPrivileged => {
                let privileged = bench.run(Some(setting), AppUser::Privileged).await;
                results.push(describe(&privileged, &untouched));
                is_refused(&ordinary) && is_harmless(&privileged)
            }
        };
        eprintln!(
            "[{:>5.1} s] {name} = {value}: {}",
            began.elapsed().as_secs_f32(),
            results.join("; privileged: ")
        );
        if !is_right {
            let _ = write!(
                wrong,
                "\n{name} = {value} should be {outcome:?}, and is {}",
                results.join("; privileged: ")
            );
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(tried >= MIN_TRIED, "only {tried} were tried");
}

fn describe(result: &Result<Models, String>, untouched: &Models) -> String {
    match result {
        Ok(models) if models == untouched => "harmless".into(),
        Ok(models) => {
            let (table, rows) = models
                .iter()
                .find(|(table, rows)| untouched[*table] != **rows)
                .expect("one table differs");
            let expected = &untouched[table];
            let at = rows.iter().zip(expected).position(|(found, expected)| found != expected);
            let at = at.unwrap_or(rows.len().min(expected.len()));
            format!(
                "HARMFUL: {table} has {} rows of {}, and {:?} instead of {:?}",
                rows.len(),
                expected.len(),
                rows.get(at),
                expected.get(at)
            )
        }
        Err(error) => format!("refused: {error}"),
    }
}

/// The database user of the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AppUser {
    /// Has every privilege in its own databases, and no other privilege.
    Ordinary,
    /// `root`.
    Privileged,
}

#[derive(Clone, Copy)]
struct Setting {
    name: &'static str,
    value: &'static str,
    is_slow: bool,
}

/// The state that all runs share.
struct SettingsBench<'s> {
    server: &'s OwnServer,
    sqs: aws_sdk_sqs::Client,
    folder: Folder,
}

impl<'s> SettingsBench<'s> {
    async fn new(server: &'s OwnServer) -> Self {
        let mut admin = connect(&server.url).await;
        for sql in [
            "drop user if exists 'app'@'%'",
            // Without a password, because MySQL accepts a password only by TLS.
            "create user 'app'@'%'",
            // No administrator privilege, because both servers skip `init_connect` for
            // administrators.
            "grant all on `settings\\_%`.* to 'app'@'%'",
        ] {
            execute(&mut admin, sql).await;
        }
        SettingsBench {
            server,
            sqs: sqs_client().await,
            folder: Folder::new().with("shapes.toml", SHAPES).with("lists.toml", LISTS),
        }
    }

    async fn admin(&self) -> MySqlConnection {
        connect(&self.server.url).await
    }

    /// Whether the server has this variable and accepts this value.
    async fn has_setting(&self, name: &'static str, value: &'static str) -> bool {
        let mut admin = self.admin().await;
        let Some(before) = global(&mut admin, name).await else { return false };
        let set = format!("set global {name} = {value}");
        let set = sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut admin).await;
        restore(&mut admin, name, &before).await;
        match set {
            // 1231: the value is a mode or a character set of the other server.
            Err(error) if server_error(&error).0 == 1231 => false,
            set => set.map(|_| true).unwrap_or_else(|error| panic!("{name} = {value}: {error}")),
        }
    }

    /// Boots and plays the read models on a new database, under a setting. Reads them after the
    /// setting has been restored.
    async fn run(&self, setting: Option<Setting>, app: AppUser) -> Result<Models, String> {
        let mut admin = self.admin().await;
        let name = format!("settings_{}", uuid::Uuid::now_v7().simple());
        execute(&mut admin, &format!("create database {name} character set utf8mb4")).await;
        let before = match setting {
            Some(Setting { name, value, .. }) => {
                let before = global(&mut admin, name).await;
                execute(&mut admin, &format!("set global {name} = {value}")).await;
                before
            }
            None => None,
        };
        let is_slow = setting.is_some_and(|setting| setting.is_slow);
        let user = if app == AppUser::Ordinary { "app" } else { "root" };
        let url = without_tls(&format!("mysql://{user}@{}/{name}", self.server.address));
        let ran = timeout(RUN_TIMEOUT, self.boot_and_play(&url, &name, is_slow)).await;
        let ran = ran.unwrap_or_else(|_| Err(format!("it does not end within {RUN_TIMEOUT:?}")));
        if let (Some(setting), Some(before)) = (setting, before) {
            restore(&mut admin, setting.name, &before).await;
        }
        let models = match ran {
            Ok(()) => Ok(read_models(&mut self.admin().await, &name).await),
            Err(error) => Err(error),
        };
        execute(&mut admin, &format!("drop database {name}")).await;
        models
    }

    async fn boot_and_play(&self, url: &str, name: &str, is_slow: bool) -> Result<(), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let database = Database::connect(url, 6, Duration::from_secs(5))
            .await
            .map_err(|error| text(&error))?;
        database.migrate().await.map_err(|error| text(&error))?;
        let store = EventStore::new(&database);
        let registry = self.registry(is_slow);
        append(&store, 0..BOOT_EVENTS).await?;
        let limits =
            Limits::default().with_batch(100).with_retry_timeout(Some(Duration::from_secs(5)));
        let booted =
            boot(&database, &registry, limits, |_| {}).await.map_err(|error| text(&error))?;
        if !booted.is_released() {
            let broken =
                booted.broken().filter_map(|booted| booted.entry.as_ref()?.status.failure());
            let broken: Vec<&str> = broken.map(|failure| failure.error.as_str()).collect();
            return Err(format!(
                "boot does not release: {}; {}",
                booted.explain(),
                broken.join("; ")
            ));
        }
        append(&store, BOOT_EVENTS..BOOT_EVENTS + PLAY_EVENTS).await?;
        let queue = self.sqs.create_queue().queue_name(format!("{name}.fifo"));
        let queue = queue
            .attributes(QueueAttributeName::FifoQueue, "true")
            .send()
            .await
            .expect("the queue is created");
        let queue_url = queue.queue_url.expect("a queue has a URL");
        let queue =
            SqsQueue::with_client(self.sqs.clone(), &queue_url, Duration::from_secs(30)).await;
        let queue = Arc::new(queue.expect("the queue answers"));
        let settings = PlaySettings::default()
            .with_limits(limits)
            .with_relay(Some(
                RelaySettings::default()
                    .with_interval(Duration::from_millis(5))
                    .with_max_events(20),
            ))
            .with_receive_wait(Duration::ZERO)
            .with_until_idle(true);
        let played = play(&database, queue, &registry, settings, std::future::pending()).await;
        let _ = self.sqs.delete_queue().queue_url(queue_url).send().await;
        match played.map_err(|error| text(&error))? {
            played if played.broken > 0 => Err("a projector broke in play".into()),
            _ => Ok(()),
        }
    }

    /// The projectors of the demo, and others that use more kinds of SQL.
    fn registry(&self, is_slow: bool) -> Registry {
        let mut registry = Registry::new();
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo/release-3");
        projectionist::load(&demo, &mut registry).expect("the projectors of the demo are valid");
        projectionist::load(self.folder.path().as_ref(), &mut registry)
            .expect("the other projectors are valid");
        registry
            .with(SlowProjector { silent_for: is_slow.then_some(SILENCE) })
            .expect("the name is unique")
    }
}

/// The value of a global variable as SQL, or `None` if the server has no such variable.
async fn global(admin: &mut MySqlConnection, name: &str) -> Option<String> {
    let read = format!("select convert(@@global.{name} using utf8mb4)");
    let value: Option<String> = match sqlx::raw_sql(AssertSqlSafe(read)).fetch_one(admin).await {
        // 1193: an unknown variable. 1238: a variable that only sessions have.
        Err(error) if [1193, 1238].contains(&server_error(&error).0) => return None,
        row => row.unwrap_or_else(|error| panic!("{name}: {error}")).try_get(0).expect(name),
    };
    Some(match value {
        None => "null".into(),
        Some(text) if text == "DEFAULT" => "default".into(),
        Some(number) if number.parse::<f64>().is_ok() => number,
        Some(text) => format!("'{}'", text.replace('\'', "''")),
    })
}

async fn restore(admin: &mut MySqlConnection, name: &str, before: &str) {
    execute(admin, &format!("set global {name} = {before}")).await;
    // Setting `super_read_only` has also set `read_only`.
    if name == "super_read_only" {
        execute(admin, "set global read_only = 0").await;
    }
}

// — the log —

const COUNTRIES: [&str; 3] = ["BE", "FR", "NL"];
const CUSTOMERS: [&str; 5] = ["plain", "José", "日本", "🦀 \\ 'crab'", "\"quoted\" %_"];
/// 2026-03-01T00:00:00.123456Z.
const FIRST: i128 = 1_772_323_200_123_456_000;
/// Each event is recorded a day and 11 minutes after the previous one.
const STEP: i128 = (86_400 + 660) * 1_000_000_000;

fn recorded_at(number: usize) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(FIRST + STEP * number as i128).expect("a date")
}

/// As in the demo: an order is placed, later paid, later shipped.
fn event(number: usize) -> NewEvent {
    let order = number / 3;
    let (event_type, payload) = match number % 3 {
        0 => (
            "OrderPlaced",
            serde_json::json!({
                "customer": customer(order), "country": country(order), "cents": cents(order)
            }),
        ),
        1 => ("OrderPaid", serde_json::json!({})),
        _ => ("OrderShipped", serde_json::json!({ "carrier": "post" })),
    };
    NewEvent {
        event_id: None,
        stream_id: format!("order-{order}"),
        stream_version: None,
        event_type: event_type.into(),
        recorded_at: Some(recorded_at(number)),
        payload: payload.to_string(),
        metadata: None,
    }
}

fn customer(order: usize) -> &'static str {
    CUSTOMERS[order % CUSTOMERS.len()]
}

fn country(order: usize) -> &'static str {
    COUNTRIES[order * 7 / 2 % COUNTRIES.len()]
}

fn cents(order: usize) -> u64 {
    100 + order as u64 * 37 % 9_900
}

async fn append(store: &EventStore, numbers: std::ops::Range<usize>) -> Result<(), String> {
    let events: Vec<NewEvent> = numbers.map(event).collect();
    store.append(&events).await.map(|_| ()).map_err(|error| error.to_string())
}

// — the read models —

/// A read model in which each column depends on at least one setting.
const SHAPES: &str = r#"
name = "shapes"
version = 1
mode = "from_beginning"
setup = ["""
create table if not exists shapes (
  position bigint unsigned primary key,
  customer varchar(64) not null,
  padded   char(64) not null,
  stamped  timestamp(6) not null,
  dated    datetime(6) not null,
  rounded  datetime not null,
  euros    decimal(12, 2) not null,
  share    decimal(30, 12) not null,
  words    varchar(500) not null,
  touched  int not null default 0
)"""]
teardown = ["drop table if exists shapes"]

[[on]]
events = ["OrderPlaced"]
sql = '''
insert into shapes (position, customer, padded, stamped, dated, rounded, euros, share, words)
values (:position, :payload.customer, :payload.customer, :recorded_at, :recorded_at, :recorded_at,
  :payload.cents / 100, :payload.cents / 7,
  concat_ws(' ', 0 || 1, week(:recorded_at), date_format(:recorded_at, '%W %M'), "double", 'a\\b',
    hex(aes_encrypt('text', 'key')), not 1 between -5 and 5, char_length(''), 'ab' regexp 'a b',
    timestamp('2026-01-02'), unix_timestamp(:recorded_at),
    cast(cast(:payload.customer as char(64)) as char), @@session.auto_increment_offset))'''

# Without a key in the condition: `sql_safe_updates` refuses such a statement.
[[on]]
events = ["OrderShipped"]
sql = "update shapes set touched = touched + 1 where touched >= 0"
"#;

/// A read model with aggregates, joins, windows and recursion.
const LISTS: &str = r#"
name = "lists"
version = 1
mode = "from_beginning"
setup = [
  """create table if not exists ordered (
  id int primary key auto_increment, customer varchar(64) not null, cents int not null)""",
  """create table if not exists lists (
  position bigint unsigned primary key, customers text, total varchar(64), depth int, sorted text,
  pairs int)""",
]
teardown = ["drop table if exists ordered", "drop table if exists lists"]

[[on]]
events = ["OrderPlaced"]
sql = "insert into ordered (customer, cents) values (:payload.customer, :payload.cents)"

[[on]]
events = ["OrderPlaced"]
sql = '''
insert into lists (position, customers, total, depth, sorted, pairs)
with recursive counted(n) as (select 1 union all select n + 1 from counted where n < 20)
select :position,
  (select group_concat(distinct customer order by customer) from ordered),
  (select cast(max(sum) as char) from (
    select sum(cents / 3e0) over (order by id rows 3 preceding) as sum from ordered) as sums),
  (select max(n) from counted),
  (select group_concat(cents order by concat(repeat('x', 70), customer), id)
    from ordered where id <= 10),
  (select count(*) from ordered as a join ordered as b on a.cents < b.cents)'''
"#;

/// A projector in Rust that can be slow, and reads and writes at every event.
struct SlowProjector {
    silent_for: Option<Duration>,
}

#[async_trait]
impl Projector for SlowProjector {
    fn name(&self) -> &str {
        "slow_reads"
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let create = "create table if not exists slow_reads \
                      (position bigint unsigned primary key, read_back text not null)";
        sqlx::raw_sql(create).execute(db).await?;
        Ok(())
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        if let (50, Some(silent_for)) = (event.position().get(), self.silent_for) {
            sqlx::raw_sql("select sleep(0.1)").execute(&mut *db).await?;
            tokio::time::sleep(silent_for).await;
        }
        let read_back: String = sqlx::query_scalar("select concat(?, ' ', ?)")
            .bind(event.payload_text())
            .bind("é日🦀")
            .fetch_one(&mut *db)
            .await?;
        let insert = sqlx::query("insert into slow_reads (position, read_back) values (?, ?)");
        insert.bind(event.position().get()).bind(read_back).execute(db).await?;
        Ok(())
    }
}

/// The table of each read model, and an expression for one of its rows as text.
const MODELS: &[(&str, &str)] = &[
    ("order_status", "concat_ws('|', order_id, status, changed_at)"),
    ("revenue", "concat_ws('|', country, orders, cents)"),
    ("customers", "concat_ws('|', customer, orders)"),
    ("first_orders", "concat_ws('|', customer, position)"),
    ("outbox", "concat_ws('|', position, customer)"),
    (
        "shapes",
        "concat_ws('|', lpad(position, 6, '0'), hex(customer), hex(padded), stamped, dated, \
         rounded, euros, share, hex(words), touched)",
    ),
    (
        "lists",
        "concat_ws('|', lpad(position, 6, '0'), hex(customers), total, depth, sorted, pairs)",
    ),
    ("ordered", "concat_ws('|', lpad(id, 6, '0'), hex(customer), cents)"),
    ("slow_reads", "concat_ws('|', lpad(position, 6, '0'), hex(read_back))"),
];

async fn read_models(admin: &mut MySqlConnection, database: &str) -> Models {
    let mut models = Models::new();
    for (table, row) in MODELS {
        let select = format!("select cast({row} as char) from {database}.{table} order by 1");
        let rows: Vec<String> =
            sqlx::query_scalar(AssertSqlSafe(select)).fetch_all(&mut *admin).await.expect(table);
        models.insert(table, rows);
    }
    let others = format!(
        "select cast(coalesce(group_concat(table_name), '') as char) \
         from information_schema.tables \
         where table_schema = '{database}' and engine <> 'InnoDB'"
    );
    let others: String =
        sqlx::query_scalar(AssertSqlSafe(others)).fetch_one(admin).await.expect("the engines");
    models.insert("tables without transactions", vec![others]);
    models
}

/// Compares the demo's read models with a fold of the log in Rust. The other read models are not
/// folded: the first run's rows are the reference for the later runs.
fn assert_folded(models: &Models) {
    let all = BOOT_EVENTS + PLAY_EVENTS;
    let text = |number: usize| {
        let at = recorded_at(number);
        format!(
            "{} {:02}:{:02}:{:02}.{:06}",
            at.date(),
            at.hour(),
            at.minute(),
            at.second(),
            at.microsecond()
        )
    };
    let mut expected = Models::new();
    for order in 0..all / 3 {
        let status = format!("order-{order}|shipped|{}", text(order * 3 + 2));
        expected.entry("order_status").or_default().push(status);
    }
    let (mut revenue, mut customers, mut first) =
        (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for order in 0..all / 3 {
        let (orders, sum) = revenue.entry(country(order)).or_insert((0, 0));
        (*orders, *sum) = (*orders + 1, *sum + cents(order));
        *customers.entry(customer(order)).or_insert(0) += 1;
        if order * 3 < BOOT_EVENTS {
            first.entry(customer(order)).or_insert(order * 3 + 1);
        } else {
            expected.entry("outbox").or_default().push(format!(
                "{}|{}",
                order * 3 + 1,
                customer(order)
            ));
        }
    }
    expected.insert(
        "revenue",
        revenue
            .iter()
            .map(|(country, (orders, sum))| format!("{country}|{orders}|{sum}"))
            .collect(),
    );
    expected.insert(
        "customers",
        customers.iter().map(|(customer, orders)| format!("{customer}|{orders}")).collect(),
    );
    expected.insert(
        "first_orders",
        first.iter().map(|(customer, position)| format!("{customer}|{position}")).collect(),
    );
    for (table, mut rows) in expected {
        let mut found = models[table].clone();
        rows.sort();
        found.sort();
        assert_eq!(found, rows, "{table}");
    }
    assert_eq!((models["shapes"].len(), models["slow_reads"].len()), (all / 3, all));
    assert_eq!(models["tables without transactions"], [""]);
}

const TOO_SMALL: &str = r#"
name = "too_small"
version = 1
mode = "from_beginning"
setup = ["""create table if not exists too_small (
  position bigint unsigned primary key, customer varchar(4) not null)"""]

[[on]]
events = ["OrderPlaced"]
sql = "insert into too_small (position, customer) values (:position, :payload.customer)"
"#;

#[tokio::test]
async fn an_oversized_value_breaks_its_projector_unless_server_modes_are_requested() {
    let server = OwnServer::start().await;
    let folder = Folder::new().with("too_small.toml", TOO_SMALL);
    let mut admin = connect(&server.url).await;
    let name = format!("settings_{}", uuid::Uuid::now_v7().simple());
    execute(&mut admin, &format!("create database {name} character set utf8mb4")).await;
    execute(&mut admin, "set global sql_mode = ''").await;
    let url = format!("{}/{name}", server.url);
    let run = async |arguments: &[&str]| {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_projectionist"));
        command
            .args(arguments)
            .args(["--projectors", folder.path(), "--database-url", &url])
            .kill_on_drop(true);
        command
            .env_remove("QUEUE_URL")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        RunningProcess::spawn(command).finish().await
    };
    let sql_mode = async |options: &[&str], level: &str| {
        let doctor = run(&[&["doctor", "--json", "--for", "boot"], options].concat()).await.json();
        let checks = doctor["checks"].as_array().expect("checks");
        let line =
            checks.iter().find(|check| check["name"] == "sql_mode").expect("a line for sql_mode");
        assert_eq!(line["level"], level, "{line}");
    };

    run(&["migrate"]).await.exits(0);
    let store = EventStore::new(
        &Database::connect(&url, 2, RUN_TIMEOUT).await.expect("the server answers"),
    );
    append(&store, 0..1).await.expect("appended");
    run(&["boot"]).await.exits(1).prints(&["too_small@1"]);
    sql_mode(&[], "note").await;
    run(&["boot", "--sql-mode", "server"]).await.exits(0);
    sql_mode(&["--sql-mode", "server"], "warning").await;
    let select = format!("select customer from {name}.too_small");
    let truncated: String =
        sqlx::query_scalar(AssertSqlSafe(select)).fetch_one(&mut admin).await.expect("a row");
    assert_eq!(truncated, "plai");
    execute(&mut admin, "set global sql_mode = default").await;
    sql_mode(&["--sql-mode", "server"], "ok").await;
    execute(&mut admin, &format!("drop database {name}")).await;
}
