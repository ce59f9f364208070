//! The values of an event in a declared statement. The effect of a value depends neither on the
//! values that were bound before, nor on the way in which it is sent.

use std::fmt::Write as _;
use std::time::Duration;

use projectionist::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection};
use projectionist::{
    Database, Event, Limits, MultiRowInsert, NewEvent, Projector, Registry, Status, async_trait,
    boot, load,
};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::support::{
    Folder, TIMEOUT, World, event, seed, server_error, side_by_side, without_tls,
};

/// JSON values of every kind.
const VALUES: &[&str] = &[
    "null",
    "true",
    "false",
    "0",
    "7",
    "-3",
    "1000",
    "1.5",
    "-0.25",
    "1e3",
    "1e20",
    "0.1",
    "18446744073709551615",
    "9223372036854775808",
    "18446744073709551617",
    "12345678901234567890.123456789",
    "\"00123\"",
    "\"abc\"",
    "\"1e3\"",
    "\"\"",
    "\" 7\"",
    "\"-1.5\"",
    "\"größe 😀\"",
    "\"it's \\\\ \\\"so\\\"\"",
    "\"2020-01-02\"",
    "\"a\\u0000b\"",
    "{\"b\": 1.0, \"a\":[null]}",
    "[ 1, \"x\" ]",
];

/// Values that every arithmetic operator accepts.
const NUMBERS: &[&str] =
    &["null", "true", "0", "7", "-3", "1000", "1.5", "-0.25", "1e3", "1e12", "9007199254740993"];

/// Expressions that accept any value.
const VALUE_EXPRESSIONS: &[&str] = &[
    "ifnull(<v>, 0)",
    "ifnull(<v>, 'x')",
    "ifnull(<v>, 1.5)",
    "coalesce(<v>, <n>, 'none')",
    "coalesce(null, <v>)",
    "case when :stream_version > 1000 then 0 else <v> end",
    "case when <n> > 2 then <v> else 'x' end",
    "if(<n> is null, <v>, 0)",
    "concat('<', <v>, '>')",
    "concat_ws('|', <v>, <w>, <n>)",
    "cast(<v> as char)",
    "json_object('a', <v>, 'b', <n>)",
    "json_array(<v>, 1)",
    "json_set('{}', '$.a', <v>)",
    "<v> is null",
    "<v> = '00123'",
    "<v> like '%1%'",
    "nullif(<v>, 'abc')",
    "upper(<v>)",
    "length(<v>)",
    "sha2(<v>, 256)",
    "elt(1, <v>, 5)",
    "substring(<v>, 1, 3)",
    "greatest(coalesce(<v>, ''), 'm')",
    "repeat(<v>, 2)",
    "replace(<v>, '0', 'o')",
    "<v> <=> <w>",
    "case <n> when 7 then 'seven' else <v> end",
    "ifnull(<v>, :recorded_at)",
    "concat(<v>, :position * 0)",
];

/// Expressions that accept numbers.
const NUMBER_EXPRESSIONS: &[&str] = &[
    "<n> + 1",
    "<n> * 2",
    "<n> - 5",
    "<n> / 4",
    "-<n>",
    "round(<n>, 1)",
    "abs(<n>)",
    "floor(<n>)",
    "<n> div 2",
    "<n> % 7",
    "cast(<n> as signed)",
    "cast(<n> as decimal(30, 5))",
    "greatest(<n>, 3)",
    "<n> between 1 and 10",
    "ifnull(<n>, 0) + 1",
    "<n> in (1, 7)",
    "least(<n>, 2.5)",
    "sign(<n>)",
    "coalesce(<n>, 0.5)",
    "if(<n> > 1, <n>, 0)",
    "<n> < 5.5",
];

const COLUMNS: &str = "(k varchar(40) collate utf8mb4_unicode_ci, \
                       bare varchar(400) collate utf8mb4_bin null, \
                       one varchar(400) collate utf8mb4_bin null, \
                       two varchar(400) collate utf8mb4_bin null, \
                       sum double null, seq bigint auto_increment primary key, unique (k))";

/// A random statement on the table `<t>`, with keys that begin with `:stream_id`.
fn statement(dice: &mut fastrand::Rng) -> String {
    let mut expression = |of: &[&str]| {
        let mut text = of[dice.usize(..of.len())].to_owned();
        let fields: [(&str, &[&str]); 3] = [
            ("<v>", &[":payload.a?", ":payload.b?", ":payload.c?"]),
            ("<w>", &[":payload.d?", ":payload.e?"]),
            ("<n>", &[":payload.n?", ":payload.m?"]),
        ];
        for (name, fields) in fields {
            while let Some(at) = text.find(name) {
                text.replace_range(at..at + name.len(), fields[dice.usize(..fields.len())]);
            }
        }
        text
    };
    let (one, two) = (expression(VALUE_EXPRESSIONS), expression(VALUE_EXPRESSIONS));
    let sum = expression(NUMBER_EXPRESSIONS);
    let key = format!("concat(:stream_id, '/{}')", dice.u32(..));
    match dice.u8(..5) {
        0 | 1 => format!(
            "insert into <t> (k, bare, one, two, sum) \
             values ({key}, :payload.a?, {one}, {two}, {sum}) \
             on duplicate key update one = concat(<t>.one, '&', values(one)), sum = values(sum)"
        ),
        2 => format!(
            "replace into <t> (k, bare, one, two, sum) \
             values ({key}, :payload.b?, {one}, {two}, {sum})"
        ),
        3 => format!(
            "insert into <t> (k, bare, one, sum) select {key}, {one}, {two}, {sum} \
             on duplicate key update two = {one}"
        ),
        _ => format!(
            "update <t> set one = concat_ws('&', one, {one}), two = {two}, \
             sum = coalesce({sum}, sum) \
             where k like concat(:stream_id, '/%') and k <> :stream_id"
        ),
    }
}

fn file(name: &str, table: &str, events: &str, statements: &[String]) -> String {
    let mut text = format!("name = '{name}'\nversion = 1\nmode = 'from_beginning'\n");
    for sql in statements {
        let sql = sql.replace("<t>", table);
        write!(text, "\n[[on]]\nevents = ['{events}']\nsql = '''{sql}'''\n").expect("a string");
    }
    text
}

/// Boots a projector file on new database sessions, and returns the status of its projector.
async fn boot_afresh(world: &World, name: &str, text: &str) -> Status {
    let folder = Folder::new().with("projector.toml", text);
    let mut registry = Registry::new();
    load(folder.path().as_ref(), &mut registry).unwrap_or_else(|error| panic!("{error}: {text}"));
    let url = without_tls(&world.database_url);
    let database = Database::connect(&url, 4, TIMEOUT).await.expect("the server answers");
    let limits = Limits::default().with_batch(1000);
    boot(&database, &registry, limits, |_| {}).await.expect("boot ends");
    world.entry(name).await.expect("the projector is in the ledger").status
}

async fn contents(world: &World, table: &str) -> Vec<String> {
    let sql = format!(
        "select concat_ws('|', k, quote(bare), quote(one), quote(two), quote(sum)) from {table} \
         order by convert(k using utf8mb4) collate utf8mb4_bin"
    );
    sqlx::query_scalar(AssertSqlSafe(sql))
        .fetch_all(&mut world.connection().await)
        .await
        .expect("the rows")
}

/// Payloads with random values.
fn payloads(dice: &mut fastrand::Rng, count: usize) -> Vec<String> {
    (0..count)
        .map(|_| {
            let mut payload = String::from("{");
            for field in ["a", "b", "c", "d", "e"] {
                if dice.u8(..10) > 0 {
                    let value = VALUES[dice.usize(..VALUES.len())];
                    write!(payload, "\"{field}\":{value},").expect("a string");
                }
            }
            for field in ["n", "m"] {
                if dice.u8(..10) > 0 {
                    write!(payload, "\"{field}\":{},", NUMBERS[dice.usize(..NUMBERS.len())])
                        .expect("a string");
                }
            }
            write!(payload, "\"z\":1}}").expect("a string");
            payload
        })
        .collect()
}

/// Boots the statements twice, once over all events together and once over each event alone on new
/// connections. Asserts that both write the same rows, and returns the number of compared events.
async fn same_as_alone(statements: &[String], payloads: &[String]) -> usize {
    let alone = World::new().await;
    let numbered = |payloads: &[String]| -> Vec<NewEvent> {
        let of = |(number, payload): (usize, &String)| NewEvent {
            event_type: format!("E{number}"),
            payload: payload.clone(),
            // Every second time has a fraction of a second.
            recorded_at: Some(
                OffsetDateTime::UNIX_EPOCH + Duration::from_micros(number as u64 * 1_500_000),
            ),
            ..event(number % 4)
        };
        payloads.iter().enumerate().map(of).collect()
    };
    let events = numbered(payloads);
    alone.store.append(&events).await.expect("appended");
    alone.execute(&format!("create table alone {COLUMNS}")).await;
    let (mut accepted, mut errors) = (Vec::new(), Vec::new());
    for (number, event) in events.into_iter().enumerate() {
        let name = format!("alone_{number}");
        match boot_afresh(&alone, &name, &file(&name, "alone", &format!("E{number}"), statements))
            .await
        {
            Status::Broken(failure) => errors.push(failure.error),
            _ => accepted.push(event),
        }
        // A broken projector does not affect the later boots, because each boot has one
        // projector.
    }
    if accepted.len() * 2 < payloads.len() {
        eprintln!("too few events can be applied: {errors:?}");
        return 0;
    }
    let together = World::new().await;
    let count = accepted.len();
    together.store.append(&accepted).await.expect("appended");
    together.execute(&format!("create table together {COLUMNS}")).await;
    let status =
        boot_afresh(&together, "together", &file("together", "together", "*", statements)).await;
    assert_eq!(status.to_string(), "live", "{status:?}\n{statements:#?}");
    let (expected, found) =
        (contents(&alone, "alone").await, contents(&together, "together").await);
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(expected, found, "{statements:#?}");
    }
    assert_eq!(expected.len(), found.len());
    count
}

#[tokio::test]
async fn a_values_effect_never_depends_on_earlier_values() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let mut compared = 0;
    for _ in 0..8 {
        let statements: Vec<String> = (0..4).map(|_| statement(&mut dice)).collect();
        let payloads = payloads(&mut dice, 30);
        compared += same_as_alone(&statements, &payloads).await;
        if compared >= 50 {
            return;
        }
    }
    panic!("only {compared} events were compared");
}

/// The first known case in which an earlier value changed the effect of a later one.
#[tokio::test]
async fn a_null_or_a_text_before_a_text_changes_nothing() {
    let statements = [
        "insert into <t> (k, one) values (concat(:stream_id, :position), ifnull(:payload.a?, 0))",
        "insert into <t> (k, one) values (concat(:position, 'b'), \
         case when :stream_version > 1000 then 0 else :payload.a? end)",
        "insert into <t> (k, one) values (concat(:position, 'c'), '') \
         on duplicate key update one = ''",
        "update <t> set one = ifnull(:payload.a?, 0) where k = concat(:position, 'c')",
    ]
    .map(str::to_owned);
    // The positions of both boots are equal only if every event can be applied. Here each can.
    for order in
        [["{}", r#"{"a":"abc"}"#, r#"{"a":"00123"}"#], [r#"{"a":"00123"}"#, "{}", r#"{"a":"abc"}"#]]
    {
        assert_eq!(same_as_alone(&statements, &order.map(str::to_owned)).await, 3);
    }
}

/// Both statements see many combinations of types.
#[tokio::test]
async fn parameters_with_many_types_store_the_same_together_as_alone() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let bare = "insert into <t> (k, bare, one, two, sum) \
                values (left(sha2(:payload, 256), 40), :payload.a?, :payload.b?, :payload.c?, \
                :payload.n?) \
                on duplicate key update one = values(one), two = concat(<t>.two, values(two))";
    let mixed = "insert into <t> (k, bare, one, two, sum) \
                 values (concat(:event_type, '+'), :recorded_at, \
                 json_array(:payload.a?, :payload.b?, :payload.d?), \
                 concat_ws(',', :payload.c?, :payload.e?), :payload.m?)";
    assert!(same_as_alone(&[bare.into(), mixed.into()], &payloads(&mut dice, 60)).await >= 30);
}

/// A null in a row is stored with the type of the column, as are the values around it.
#[tokio::test]
async fn a_lone_null_in_a_row_does_not_decide_the_column_type() {
    let values = [
        (
            "varchar(60) collate utf8mb4_bin",
            &["\"00123\"", "5", "1.5", "12345678901234567890.123456789", "\"abc\"", "true"][..],
        ),
        ("bigint", &["5", "\"00123\"", "-3", "1e3", "\"7\"", "9223372036854775807"]),
        (
            "decimal(40, 12)",
            &["5", "12345678901234567890.123456789", "\"00123.5\"", "1.5", "18446744073709551617"],
        ),
        ("double", &["5", "1.5", "\"1e3\"", "12345678901234567890.5", "-3"]),
        ("json", &["{\"a\":1}", "[1]", "\"\\\"text\\\"\"", "\"12\""]),
        ("datetime(6)", &["\"2020-01-02 03:04:05.678901\"", "\"2020-01-02\"", "20200102030405"]),
    ];
    let mut dice = fastrand::Rng::with_seed(seed());
    let cases = values.map(|(column, values)| {
        let mut all: Vec<&str> = (0..40)
            .map(|_| if dice.bool() { "null" } else { values[dice.usize(..values.len())] })
            .collect();
        all[0] = "null";
        (column, all)
    });
    side_by_side(3, cases, async |(column, all)| {
        let (alone, together) = (World::new().await, World::new().await);
        let statement = ["insert into <t> (v) values (:payload.v?)".to_owned()];
        for (world, table) in [(&alone, "alone"), (&together, "together")] {
            let events: Vec<NewEvent> = all
                .iter()
                .enumerate()
                .map(|(number, value)| NewEvent {
                    event_type: format!("E{number}"),
                    payload: format!(r#"{{"v":{value}}}"#),
                    ..event(0)
                })
                .collect();
            world.store.append(&events).await.expect("appended");
            world
                .execute(&format!(
                    "create table {table} (v {column} null, seq bigint auto_increment primary key)"
                ))
                .await;
        }
        for number in 0..all.len() {
            let name = format!("alone_{number}");
            boot_afresh(&alone, &name, &file(&name, "alone", &format!("E{number}"), &statement))
                .await;
        }
        let status =
            boot_afresh(&together, "together", &file("together", "together", "*", &statement))
                .await;
        assert_eq!(status.to_string(), "live", "{column}: {status:?}");
        let rows = async |world: &World, table: &str| -> Vec<Option<String>> {
            let sql = format!("select cast(v as char) from {table} order by seq");
            sqlx::query_scalar(AssertSqlSafe(sql))
                .fetch_all(&mut world.connection().await)
                .await
                .expect("the rows")
        };
        assert_eq!(
            rows(&together, "together").await,
            rows(&alone, "alone").await,
            "{column}: {all:?}"
        );
    })
    .await;
}

const TIMES: [&str; 5] = [
    "1000-01-01T00:00:00Z",
    "1969-12-31T23:59:59.999999Z",
    "2024-02-29T12:00:00.000001Z",
    "2038-01-19T03:14:08Z",
    "9999-12-31T23:59:59.999999Z",
];

/// A projector in Rust that binds a time in both of its forms.
struct Times;

#[async_trait]
impl Projector for Times {
    fn name(&self) -> &str {
        "times"
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let mut rows = MultiRowInsert::new("insert into rust_times (position, at, other) values");
        rows.row()
            .bind(event.position().get())
            .bind(event.recorded_at_utc())
            .bind(event.recorded_at());
        rows.execute(db).await?;
        Ok(())
    }
}

#[tokio::test]
async fn a_time_in_any_year_is_stored_as_recorded() {
    let world = World::new().await;
    for table in ["declared_times", "rust_times"] {
        world
            .execute(&format!(
                "create table {table} (position bigint unsigned primary key, \
                 at datetime(6) null, other datetime(6) null, text varchar(40) null)"
            ))
            .await;
    }
    let text = "name = 'declared_times'\nversion = 1\nmode = 'from_beginning'\n\
                [[on]]\nevents = ['*']\nsql = '''insert into declared_times \
                values (:position, :recorded_at, coalesce(:recorded_at, null), \
                concat(:recorded_at, ''))'''\n";
    let folder = Folder::new().with("times.toml", text);
    let mut registry = Registry::new();
    load(folder.path().as_ref(), &mut registry).expect("the file is valid");
    registry.add(Times).expect("a name");
    let append = async || {
        for time in TIMES {
            let at = OffsetDateTime::parse(time, &Rfc3339).expect("a time");
            world
                .store
                .append(&[NewEvent { recorded_at: Some(at), ..event(0) }])
                .await
                .expect("appended");
        }
    };
    append().await;
    assert!(world.boot(&registry).await.is_released(), "{:?}", world.ledger.entries().await);
    append().await;
    world.play_until_idle(&registry).await;
    for table in ["declared_times", "rust_times"] {
        let sql = format!(
            "select date_format(at, '%Y-%m-%dT%H:%i:%s.%fZ') as at, \
             cast(at <=> other as signed) as same from {table} order by position"
        );
        let rows: Vec<(Option<String>, i64)> = sqlx::query_as(AssertSqlSafe(sql))
            .fetch_all(&mut world.connection().await)
            .await
            .expect("the rows");
        let expected = TIMES.map(|time| {
            let text =
                if time.contains('.') { time.to_owned() } else { time.replace('Z', ".000000Z") };
            (Some(text), 1)
        });
        assert_eq!(rows, [expected.clone(), expected].concat(), "{table}");
    }
    let logged: u64 =
        world.number("select cast(count(distinct recorded_at) as unsigned) from events").await;
    assert_eq!(logged, 5, "the log stores every time");
}

/// A column whose collation or character set differs from that of the connection is compared as
/// with a literal.
#[tokio::test]
async fn a_text_is_compared_by_the_collation_of_the_column() {
    let world = World::new().await;
    let mut connection = world.connection().await;
    for collation in
        ["utf8mb4_unicode_ci", "utf8mb4_bin", "utf8mb4_general_ci", "latin1_swedish_ci"]
    {
        let (table, charset) =
            (format!("t_{collation}"), collation.split('_').next().expect("a part"));
        world
            .execute(&format!(
                "create table {table} (k varchar(20) character set {charset} collate {collation}, \
                 n int, key (k))"
            ))
            .await;
        world.execute(&format!("insert into {table} values ('Case-0', 0), ('case-0', 0)")).await;
    }
    let mut text = "name = 'collations'\nversion = 1\nmode = 'from_beginning'\n".to_owned();
    for collation in
        ["utf8mb4_unicode_ci", "utf8mb4_bin", "utf8mb4_general_ci", "latin1_swedish_ci"]
    {
        write!(
            text,
            "[[on]]\nevents = ['*']\n\
             sql = 'update t_{collation} set n = n + 1 where k = :stream_id'\n"
        )
        .expect("a string");
    }
    world.store.append(&[event(0)]).await.expect("appended");
    let status = boot_afresh(&world, "collations", &text).await;
    assert_eq!(status.to_string(), "live", "{status:?}");
    for (table, expected) in [
        ("t_utf8mb4_unicode_ci", 2),
        ("t_utf8mb4_bin", 1),
        ("t_utf8mb4_general_ci", 2),
        ("t_latin1_swedish_ci", 2),
    ] {
        assert_eq!(
            world.number(&format!("select cast(sum(n) as unsigned) from {table}")).await,
            expected,
            "{table}"
        );
    }
    connection.ping().await.expect("the connection works");
}

/// A JSON text for the payload: `a` and `b.c` have unusual values, or the whole text is unusual.
fn odd_json(dice: &mut fastrand::Rng) -> String {
    const PARTS: [&str; 22] = [
        "x",
        "é",
        "😀",
        "\\\\",
        "\\\"",
        "\\/",
        "\\n",
        "\\u00e9",
        "\\ud83d\\ude00",
        "\\'",
        "\\v",
        "\\x41",
        "\\a",
        "\\0",
        "\\é",
        "\\😀",
        "'",
        " ",
        "\\ud800",
        "\t",
        "\\u00",
        "\u{1}",
    ];
    const NUMBERS: [&str; 24] = [
        "1",
        "-1",
        "1.5",
        "1.",
        "-2.",
        "0.",
        "1.e5",
        "2.e-1",
        "1e5",
        "1E+2",
        "1e",
        "1e+",
        "1.5e-",
        "-",
        "01",
        ".5",
        "+1",
        "-0",
        "NaN",
        "0x1",
        "18446744073709551615",
        "0.10",
        "1e999",
        "-0.0",
    ];
    let value = |dice: &mut fastrand::Rng| match dice.u8(..6) {
        0 => ["true", "false", "null", "True", "[]", "{\"x\":\"\\'\"}", "[1.,2]"][dice.usize(..7)]
            .to_owned(),
        1..3 => NUMBERS[dice.usize(..NUMBERS.len())].to_owned(),
        _ => {
            // The last four parts are refused by the server, and are therefore used rarely.
            let parts = if dice.u8(..8) == 0 { PARTS.len() } else { PARTS.len() - 4 };
            let text: String = (0..dice.usize(1..4)).map(|_| PARTS[dice.usize(..parts)]).collect();
            format!("\"{text}\"")
        }
    };
    let (a, c) = (value(dice), value(dice));
    let end = ["", "", "", " ", "\n", "\0", "\0 rest \"", " \0", "x", ","][dice.usize(..10)];
    let key = ["k", "\\'", "\\x", "\\u0061b"][dice.usize(..4)];
    format!("{{\"{key}\":1,\"a\":{a},\"b\":{{\"c\":{c}}}}}{end}")
}

/// Whether a bound value is equivalent to the `json_value` of the server. Some differences are
/// intended: a number is bound as a number, a boolean as 1 or 0, an object or array as its text.
/// MariaDB returns null for an empty string.
fn is_equivalent(bound: Option<&str>, from_server: Option<&str>) -> bool {
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<f64>().ok());
    match (bound, from_server) {
        _ if bound == from_server => true,
        (Some("1"), Some("true")) | (Some("0"), Some("false")) | (Some(""), None) => true,
        (Some(bound), None) => bound.starts_with(['[', '{']),
        _ => number(bound).is_some() && number(bound) == number(from_server),
    }
}

/// Decodes every payload and discards the value: `1e999` is valid JSON but not a number in Rust.
struct Decodes;

#[async_trait]
impl Projector for Decodes {
    fn name(&self) -> &str {
        "decodes"
    }

    async fn handle(&self, event: &Event, _db: &mut MySqlConnection) -> anyhow::Result<()> {
        event.payload::<serde::de::IgnoredAny>()?;
        Ok(())
    }
}

#[tokio::test]
async fn json_accepted_by_the_log_is_read_as_the_server_reads_it() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let world = World::new().await;
    let column = "varchar(600) character set utf8mb4 collate utf8mb4_bin null";
    world
        .execute(&format!(
            "create table odd (position bigint unsigned primary key, \
             a {column}, c {column}, whole mediumtext)"
        ))
        .await;
    let text = "name = 'odd'\nversion = 1\nmode = 'from_beginning'\n[[on]]\nevents = ['*']\n\
                sql = 'insert into odd values (:position, :payload.a?, :payload.b.c?, :payload)'\n";
    let folder = Folder::new().with("odd.toml", text);
    let mut registry = Registry::new();
    load(folder.path().as_ref(), &mut registry).expect("the file is valid");
    registry.add(Decodes).expect("a name");
    let mut writer = world.connection().await;
    let mut refused_by_serde = 0;
    let mut append = async |count: usize, dice: &mut fastrand::Rng| {
        for _ in 0..count {
            let payload = odd_json(dice);
            let insert = "insert into events (stream_id, stream_version, event_type, payload) \
                 select 'odd', coalesce(max(stream_version), 0) + 1, 'Opened', ? from events";
            match sqlx::query(insert).bind(&payload).execute(&mut writer).await {
                Ok(_) => {
                    refused_by_serde +=
                        usize::from(serde_json::from_str::<serde_json::Value>(&payload).is_err())
                }
                Err(error) => {
                    assert!(
                        [3819, 4025, 3140, 3141].contains(&server_error(&error).0),
                        "{payload:?}: {error}"
                    )
                }
            }
        }
        refused_by_serde
    };
    append(400, &mut dice).await;
    assert!(world.boot(&registry).await.is_released(), "{:?}", world.ledger.entries().await);
    assert!(append(200, &mut dice).await > 5, "too few payloads are refused by serde");
    world.play_until_idle(&registry).await;
    assert_eq!(
        (world.status("odd").await, world.status("decodes").await),
        ("live".into(), "live".into())
    );
    type Row = (u64, String, Option<String>, Option<String>, Option<String>, Option<String>, bool);
    let rows: Vec<Row> = sqlx::query_as(
        "select position, payload, a, json_value(payload, '$.a'), c, \
         json_value(payload, '$.b.c'), binary whole <=> binary payload \
         from events join odd using (position) order by position",
    )
    .fetch_all(&mut writer)
    .await
    .expect("the rows");
    assert!(rows.len() as u64 == world.last_position().await && rows.len() > 30, "{}", rows.len());
    for (position, payload, a, server_a, c, server_c, is_whole) in rows {
        assert!(
            is_equivalent(a.as_deref(), server_a.as_deref()),
            "{position}, {payload:?}: {a:?}, not {server_a:?}"
        );
        assert!(
            is_equivalent(c.as_deref(), server_c.as_deref()),
            "{position}, {payload:?}: {c:?}, not {server_c:?}"
        );
        assert!(is_whole, "{position}: the whole payload is stored byte for byte");
    }
}
