//! Projectors that are declared in files, on a real server.

use std::fmt::Write as _;
use std::time::Duration;

use projectionist::sqlx::{self, AssertSqlSafe};
use projectionist::{Limits, NewEvent, Registry, boot, load};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::support::{Folder, World, seed};

/// A projector file whose `setup` creates a table of the projector's name.
fn file(name: &str, columns: &str, handlers: &[&str]) -> String {
    let mut text = format!(
        "name = '{name}'\nversion = 1\nmode = 'from_beginning'\n\
         setup = ['''create table if not exists {name} (seq bigint auto_increment primary key, \
         {columns})''']\n\
         teardown = ['drop table if exists {name}']\n"
    );
    for sql in handlers {
        write!(text, "\n[[on]]\nevents = ['*']\nsql = '''{sql}'''\n")
            .expect("writing to a string succeeds");
    }
    text
}

fn registry(folder: &Folder) -> Registry {
    let mut registry = Registry::new();
    load(folder.path().as_ref(), &mut registry).expect("the files are valid");
    registry
}

fn event(payload: &str) -> NewEvent {
    NewEvent {
        event_id: None,
        stream_id: "case-1".into(),
        stream_version: None,
        event_type: "Received".into(),
        recorded_at: None,
        payload: payload.into(),
        metadata: None,
    }
}

/// Appends an event with each of these payloads, in one transaction.
async fn append(world: &World, payloads: &[String]) {
    let events: Vec<NewEvent> = payloads.iter().map(|payload| event(payload)).collect();
    world.store.append(&events).await.expect("the events are appended");
}

/// One column of a table, in the order of the query.
async fn column(world: &World, sql: &str) -> Vec<Option<String>> {
    sqlx::query_scalar(AssertSqlSafe(sql))
        .fetch_all(&mut world.connection().await)
        .await
        .expect(sql)
}

fn some(texts: &[&str]) -> Vec<Option<String>> {
    texts.iter().map(|text| Some((*text).to_owned())).collect()
}

/// A JSON value, the text in a text column, and the number in a wide decimal column. `None` if the
/// value is not a number.
const VALUES: &[(&str, Option<&str>, Option<&str>)] = &[
    ("null", None, None),
    ("true", Some("1"), Some("1.000000000000")),
    ("false", Some("0"), Some("0.000000000000")),
    ("0", Some("0"), Some("0.000000000000")),
    ("-5", Some("-5"), Some("-5.000000000000")),
    ("9223372036854775807", Some("9223372036854775807"), Some("9223372036854775807.000000000000")),
    (
        "-9223372036854775808",
        Some("-9223372036854775808"),
        Some("-9223372036854775808.000000000000"),
    ),
    (
        "18446744073709551615",
        Some("18446744073709551615"),
        Some("18446744073709551615.000000000000"),
    ),
    (
        "18446744073709551617",
        Some("18446744073709551617"),
        Some("18446744073709551617.000000000000"),
    ),
    ("10.5", Some("10.5"), Some("10.500000000000")),
    ("-0.25", Some("-0.25"), Some("-0.250000000000")),
    ("1e3", Some("1000"), Some("1000.000000000000")),
    ("0.1", Some("0.1"), Some("0.100000000000")),
    (
        "12345678901234567.891",
        Some("12345678901234567.891"),
        Some("12345678901234567.891000000000"),
    ),
    (
        "1234567890123456789012345.5",
        Some("1234567890123456789012345.5"),
        Some("1234567890123456789012345.500000000000"),
    ),
    (r#""00123""#, Some("00123"), Some("123.000000000000")),
    (
        r#""12345678901234567890.5""#,
        Some("12345678901234567890.5"),
        Some("12345678901234567890.500000000000"),
    ),
    (r#""""#, Some(""), None),
    (r#"" two  blanks ""#, Some(" two  blanks "), None),
    (r#""it's \"so\" \\ :position ? -- /*""#, Some(r#"it's "so" \ :position ? -- /*"#), None),
    (r#""\u0041\u00e9\ud83d\ude00""#, Some("Aé😀"), None),
    (r#""2010-10-02T07:20:39Z""#, Some("2010-10-02T07:20:39Z"), None),
    (r#"{ "a" : [1, 2.50] }"#, Some(r#"{ "a" : [1, 2.50] }"#), None),
    ("[ ]", Some("[ ]"), None),
    ("{}", Some("{}"), None),
];

/// Boots over payloads `{"v": …}` with these values and compares the columns.
async fn bind_exactly(values: &[(&str, Option<&str>, Option<&str>)]) {
    let world = World::new().await;
    let payloads: Vec<String> =
        values.iter().map(|(value, ..)| format!(r#"{{"v":{value}}}"#)).collect();
    append(&world, &payloads).await;
    let texts = file(
        "texts",
        "v varchar(200) collate utf8mb4_bin null",
        &["insert into texts (v) values (:payload.v)"],
    );
    // Only numbers are inserted, because a decimal column rejects other values.
    let decimals = file(
        "decimals",
        "position bigint, v decimal(50, 12) null",
        &["insert into decimals (position, v) select :position, :payload.v from numbers \
             where position = :position"],
    );
    let folder = Folder::new().with("1.toml", &texts).with("2.toml", &decimals);
    world.execute("create table numbers (position bigint primary key)").await;
    for (position, _) in (1..).zip(values).filter(|(_, (_, _, decimal))| decimal.is_some()) {
        world.execute(&format!("insert into numbers values ({position})")).await;
    }

    assert!(
        world.boot(&registry(&folder)).await.is_released(),
        "{:?}",
        world.ledger.entries().await
    );
    let texts = column(&world, "select v from texts order by seq").await;
    let expected: Vec<Option<String>> =
        values.iter().map(|(_, text, _)| text.map(str::to_owned)).collect();
    assert_eq!(texts, expected);
    let decimals = column(&world, "select cast(v as char) from decimals order by position").await;
    let expected: Vec<Option<String>> = values
        .iter()
        .filter_map(|(_, _, decimal)| decimal.map(|decimal| Some(decimal.to_owned())))
        .collect();
    assert_eq!(decimals, expected);
}

#[tokio::test]
async fn each_kind_of_json_value_binds_exactly() {
    bind_exactly(VALUES).await;
}

/// One statement on one connection in one transaction. The value that an event binds does not
/// depend on the previous event.
#[tokio::test]
async fn a_value_binds_the_same_whatever_was_bound_before() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let mut values: Vec<_> = VALUES.iter().chain(VALUES).chain(VALUES).copied().collect();
    dice.shuffle(&mut values);
    let ten_and_a_half =
        VALUES.iter().find(|(value, ..)| *value == "10.5").expect("the value is in the list");
    let zeros_first =
        VALUES.iter().find(|(value, ..)| *value == r#""00123""#).expect("the value is in the list");
    values.splice(0..0, [*ten_and_a_half, *zeros_first]);
    bind_exactly(&values).await;
}

#[tokio::test]
async fn the_columns_of_an_event_bind_exactly() {
    let world = World::new().await;
    let odd = NewEvent {
        event_id: Some("it's-\\-an:id".into()),
        stream_id: "Fall-Größe 😀".into(),
        event_type: "with \"quotes\", ? and :payload".into(),
        recorded_at: Some(
            OffsetDateTime::parse("2010-10-02T09:20:39.266001+02:00", &Rfc3339)
                .expect("the time is valid"),
        ),
        payload: r#"{ "b" : 1.0, "a" : "\u0041" }"#.into(),
        metadata: Some("[ 1, {} ]".into()),
        ..event("{}")
    };
    let plain = NewEvent { stream_id: odd.stream_id.clone(), ..event("0") };
    world.store.append(&[event("1"), odd.clone(), plain]).await.expect("the events are appended");

    let columns = "position bigint unsigned, event_id varchar(64), stream_id varchar(200), \
                   stream_version bigint unsigned, \
                   event_type varchar(200), recorded_at datetime(6), payload text, \
                   metadata text null";
    let sql = "insert into all_columns (position, event_id, stream_id, stream_version, event_type, \
               recorded_at, payload, metadata) \
               values (:position, :event_id, :stream_id, :stream_version, :event_type, \
               :recorded_at, :payload, :metadata?)";
    let folder = Folder::new().with("1.toml", &file("all_columns", columns, &[sql]));
    assert!(world.boot(&registry(&folder)).await.is_released());

    let differing = "select count(*) from events e left join all_columns a using (position, \
                     event_id, stream_id, \
                     stream_version, event_type, recorded_at, payload) \
                     where a.position is null or not (a.metadata <=> e.metadata)";
    assert_eq!(
        (world.number("select count(*) from all_columns").await, world.number(differing).await),
        (3, 0)
    );
    let row = column(
        &world,
        "select concat_ws('|', position, event_id, stream_id, stream_version, event_type, \
         recorded_at, payload, metadata) \
         from all_columns where position = 2",
    );
    let expected = "2|it's-\\-an:id|Fall-Größe 😀|1|with \"quotes\", ? and :payload|\
                    2010-10-02 07:20:39.266001|\
                    { \"b\" : 1.0, \"a\" : \"\\u0041\" }|[ 1, {} ]";
    assert_eq!(row.await, some(&[expected]));
    assert_eq!(
        column(&world, "select metadata from all_columns where position <> 2").await,
        [None, None]
    );
}

#[tokio::test]
async fn paths_reach_into_objects_and_arrays_in_payload_and_metadata() {
    let world = World::new().await;
    let payload = json!({
        "a": {"b": {"c": "deep"}},
        "items": ["first", {"sku": "second"}],
        "odd key": {"say \"x\"": "odd"},
    });
    let metadata = json!({"user": {"id": 7}});
    let nested = NewEvent { metadata: Some(metadata.to_string()), ..event(&payload.to_string()) };
    world.store.append(&[nested]).await.expect("the event is appended");
    let sql = r#"insert into paths (v) values (concat_ws('|',
                 :payload.a.b.c, :payload.items.0, :payload.items.1.sku,
                 :payload."odd key"."say ""x""", :metadata.user.id, :payload.a.b,
                 coalesce(:payload.items.2?, 'none')))"#;
    let folder = Folder::new().with("1.toml", &file("paths", "v text", &[sql]));
    assert!(world.boot(&registry(&folder)).await.is_released());
    assert_eq!(
        column(&world, "select v from paths").await,
        some(&[r#"deep|first|second|odd|7|{"c":"deep"}|none"#])
    );
}

#[tokio::test]
async fn a_question_mark_binds_null_for_a_missing_path() {
    let world = World::new().await;
    append(&world, &[r#"{"v":1}"#.into(), "{}".into(), r#"{"v":null}"#.into(), "7".into()]).await;
    let sql = "insert into optional (v, m) values (:payload.v?, :metadata.user?)";
    let folder = Folder::new().with("1.toml", &file("optional", "v int null, m text null", &[sql]));
    assert!(world.boot(&registry(&folder)).await.is_released());
    let values = column(&world, "select cast(v as char) from optional order by seq").await;
    assert_eq!(values, [Some("1".into()), None, None, None]);
    assert_eq!(world.number("select count(*) from optional where m is null").await, 4);
}

#[tokio::test]
async fn a_missing_path_breaks_the_projector_at_that_event() {
    let world = World::new().await;
    append(
        &world,
        &[r#"{"v":1}"#.into(), r#"{"v":2}"#.into(), r#"{"w":3}"#.into(), r#"{"v":4}"#.into()],
    )
    .await;
    let folder = Folder::new()
        .with("1.toml", &file("strict", "v int", &["insert into strict (v) values (:payload.v)"]));
    let booted =
        world.run(&["boot", "--json", "--projectors", folder.path()]).await.exits(1).json();
    let projector = &booted["projectors"][0];
    assert_eq!((&projector["status"], &projector["position"]), (&"broken".into(), &2.into()));
    assert_eq!(
        (&projector["failure"]["position"], &projector["failure"]["event_type"]),
        (&3.into(), &"Received".into())
    );
    let error = projector["failure"]["error"].as_str().expect("the error is text");
    for words in [
        &folder.file("1.toml"),
        ":7",
        "`:payload.v` is missing in the event's payload",
        "write `:payload.v?`",
    ] {
        assert!(error.contains(words), "{words} in {error}");
    }
    assert_eq!(
        world.number("select count(*) from strict").await,
        2,
        "the events before it are applied once"
    );
}

#[tokio::test]
async fn handlers_run_in_file_order_and_in_one_transaction() {
    let world = World::new().await;
    append(&world, &["1".into(), "2".into(), "3".into()]).await;
    let poison = "insert into steps (at, step) values (nullif(:position, 3), 'second')";
    let first = "insert into steps (at, step) values (:position, 'first')";
    let third = "insert into steps (at, step) select at, concat('after ', step) from steps \
                 where at = :position order by seq desc limit 1";
    let folder = Folder::new().with(
        "1.toml",
        &file("steps", "at int not null, step varchar(20)", &[first, poison, third]),
    );
    assert!(!world.boot(&registry(&folder)).await.is_released());
    let steps = column(&world, "select concat(at, ' ', step) from steps order by seq").await;
    let expected =
        ["1 first", "1 second", "1 after second", "2 first", "2 second", "2 after second"];
    assert_eq!(steps, some(&expected), "no row of the failing event is stored");
    assert_eq!(world.position("steps").await, 2);
}

#[tokio::test]
async fn an_event_runs_the_handlers_that_name_its_type() {
    let world = World::new().await;
    world.append(6).await;
    let mut text = file(
        "typed",
        "at int, who varchar(20)",
        &["insert into typed (at, who) values (:position, 'all')"],
    );
    for types in ["'Opened', 'Closed'", "'Closed'", "'Never seen'"] {
        let who = types.replace('\'', "");
        write!(
            text,
            "\n[[on]]\nevents = [{types}]\nsql = \"insert into typed (at, who) values (:position, \
             '{who}')\"\n"
        )
        .expect("writing to a string succeeds");
    }
    let folder = Folder::new().with("1.toml", &text);
    assert!(world.boot(&registry(&folder)).await.is_released());
    let rows =
        column(&world, "select concat(at, ' ', who) from typed where at <= 3 order by seq").await;
    // The types alternate: Opened, Amended, Closed.
    assert_eq!(
        rows,
        some(&["1 all", "1 Opened, Closed", "2 all", "3 all", "3 Opened, Closed", "3 Closed"])
    );
    assert_eq!(world.number("select count(*) from typed").await, 12);
}

#[tokio::test]
async fn colons_in_literals_names_and_comments_are_left_alone() {
    let world = World::new().await;
    append(&world, &["1".into(), "2".into()]).await;
    let sql = "insert into colons (at, `odd:position`, v) -- :nothing ; ?\n\
               values /* :payload.nothing */ (cast('12:30:45' as time), \":position\", \
               concat('it''s \\':payload', ':', :position)) # :x";
    let columns = "at time, `odd:position` varchar(20), v varchar(40)";
    let folder = Folder::new().with("1.toml", &file("colons", columns, &[sql]));
    assert!(
        world.boot(&registry(&folder)).await.is_released(),
        "{:?}",
        world.ledger.entries().await
    );
    let rows =
        column(&world, "select concat_ws('|', at, `odd:position`, v) from colons order by seq")
            .await;
    assert_eq!(
        rows,
        some(&["12:30:45|:position|it's ':payload:1", "12:30:45|:position|it's ':payload:2"])
    );
}

#[tokio::test]
async fn a_value_never_becomes_part_of_the_statement() {
    let world = World::new().await;
    let injection = "'); drop table safe; -- :position ?";
    append(&world, &[json!({ "v": injection }).to_string()]).await;
    let folder = Folder::new()
        .with("1.toml", &file("safe", "v text", &["insert into safe (v) values (:payload.v)"]));
    assert!(world.boot(&registry(&folder)).await.is_released());
    assert_eq!(column(&world, "select v from safe").await, some(&[injection]));
}

#[tokio::test]
async fn setup_is_run_again_when_boot_resumes() {
    let world = World::new().await;
    append(&world, &["1".into(), "2".into(), "3".into()]).await;
    let broken = file(
        "resumed",
        "v int not null",
        &["insert into resumed (v) values (nullif(:position, 2))"],
    );
    let folder = Folder::new().with("1.toml", &broken);
    assert!(!world.boot(&registry(&folder)).await.is_released());

    // A repaired projector may need another table.
    let repaired = broken
        .replace("setup = [", "setup = ['create table if not exists resumed_too (v int)', ")
        .replace(
            "insert into resumed (v) values (nullif(:position, 2))",
            "insert into resumed_too (v) values (:position)",
        );
    folder.write("1.toml", &repaired);
    // A new table lacks the earlier events, so boot requires `--accept`.
    let boot = ["boot", "--projectors", folder.path()];
    world.run(&boot).await.exits(1).prints(&["resumed@1", "table resumed_too", "--accept"]);
    world.run(&[&boot[..], &["--accept", "resumed"]].concat()).await.exits(0);
    assert_eq!(column(&world, "select cast(v as char) from resumed").await, some(&["1"]));
    assert_eq!(
        column(&world, "select cast(v as char) from resumed_too order by v").await,
        some(&["2", "3"])
    );
}

#[tokio::test]
async fn a_failing_setup_is_reported_with_file_line_and_reason() {
    let world = World::new().await;
    append(&world, &["1".into()]).await;
    let text = file("no_setup", "v int", &["insert into no_setup (v) values (:position)"])
        .replace("v int", "v no_such_type");
    let folder = Folder::new().with("1.toml", &text);
    let booted =
        world.run(&["boot", "--json", "--projectors", folder.path()]).await.exits(1).json();
    let failure = &booted["projectors"][0]["failure"];
    assert_eq!(
        (&failure["position"], &failure["event_type"]),
        (&json!(null), &json!(null)),
        "the failure names no event"
    );
    let error = failure["error"].as_str().expect("the error is text");
    for words in ["setup failed", &format!("{}:4", folder.file("1.toml")), "no_such_type"] {
        assert!(error.contains(words), "{words} in {error}");
    }
    folder.write("1.toml", &text.replace("v no_such_type", "v int"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(column(&world, "select cast(v as char) from no_setup").await, some(&["1"]));
}

#[tokio::test]
async fn projectors_are_played_in_file_name_order() {
    let world = World::new().await;
    world
        .execute(
            "create table trail (seq bigint auto_increment primary key, who varchar(20), at int)",
        )
        .await;
    let folder = Folder::new();
    for (name, projector) in [("c.toml", "first"), ("a.toml", "third"), ("b.toml", "second")] {
        let sql = format!("insert into trail (who, at) values ('{name}', :position)");
        folder.write(name, &file(projector, "v int", &[&sql]));
    }
    let registry = registry(&folder);
    assert!(world.boot(&registry).await.is_released());
    append(&world, &["1".into(), "2".into()]).await;
    world.play_until_idle(&registry).await;
    let trail = column(&world, "select who from trail where at = 1 order by seq").await;
    assert_eq!(trail, some(&["a.toml", "b.toml", "c.toml"]));
    assert_eq!(world.number("select count(*) from trail").await, 6);
}

#[tokio::test]
async fn a_statement_that_never_ends_breaks_its_projector_at_its_file_and_line() {
    let world = World::new().await;
    let endless = "insert into slow (position) select :position from (select sleep(1000)) as t";
    let handlers = ["insert into slow (position) values (:position)", endless];
    let folder = Folder::new().with("slow.toml", &file("slow", "position bigint", &handlers));
    append(&world, &["{}".into()]).await;
    let limits = Limits::default().with_handler_timeout(Duration::from_millis(300));
    let booted = boot(&world.database, &registry(&folder), limits, |_| {}).await;
    assert!(!booted.expect("boot ends").is_released());
    let line = folder.file("slow.toml") + ":11: the handler of slow@1 took longer than 0.3 s";
    world.assert_broken("slow", 1, &line).await;
    world.assert_broken("slow", 1, "--handler-timeout").await;
}
