//! Declared statements are sent as text, many in one packet. The tests state that neither the types
//! of the values, nor the neighbours of a statement, change the stored rows.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex};

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use projectionist::{
    Event, Limits, NewEvent, Projector, Registry, Status, async_trait, boot, load,
};

use crate::support::{Folder, World, event, seed};

fn of_payload(number: usize, payload: String) -> NewEvent {
    NewEvent { payload, ..event(number) }
}

/// A file with these statements, each for every event, from line 4 on.
fn file(statements: &[&str]) -> String {
    let mut text = "name = 'text'\nversion = 1\nmode = 'from_beginning'\n".to_owned();
    for sql in statements {
        write!(text, "[[on]]\nevents = ['*']\nsql = '''{sql}'''\n").expect("a string");
    }
    text
}

/// Boots the file over all events in batches of 1,000. Returns the error if its projector broke.
async fn boot_file(world: &World, text: &str) -> Option<String> {
    let folder = Folder::new().with("projector.toml", text);
    let mut registry = Registry::new();
    load(folder.path().as_ref(), &mut registry).unwrap_or_else(|error| panic!("{error}: {text}"));
    boot(&world.database, &registry, Limits::default(), |_| {}).await.expect("boot ends");
    match world.entry("text").await.expect("the projector is in the ledger").status {
        Status::Broken(failure) => Some(failure.error),
        status => {
            assert_eq!(status.to_string(), "live");
            None
        }
    }
}

const FIELDS: usize = 10;

/// Each of ten fields is a whole number or not: 1,024 combinations of types.
#[tokio::test]
async fn every_combination_of_sometimes_whole_numbers_is_stored_exactly() {
    let world = World::new().await;
    let mut dice = fastrand::Rng::with_seed(seed());
    let mut events = Vec::new();
    let mut expected = Vec::new();
    for number in 0..1_500 {
        let quarters: Vec<i64> = (0..FIELDS).map(|_| dice.i64(-400..400)).collect();
        let fields = quarters.iter().enumerate().map(|(field, quarters)| {
            let whole = if quarters % 4 == 0 { (quarters / 4).to_string() } else { String::new() };
            let value = if whole.is_empty() { (*quarters as f64 / 4.0).to_string() } else { whole };
            format!("\"f{field}\":{value}")
        });
        let payload = format!("{{{}}}", fields.collect::<Vec<_>>().join(","));
        events.push(of_payload(number, payload));
        expected.push(quarters);
    }
    world.store.append(&events).await.expect("appended");
    let columns: Vec<String> = (0..FIELDS).map(|field| format!("f{field}")).collect();
    let list = columns.join(", ");
    let parameters: Vec<String> = columns.iter().map(|name| format!(":payload.{name}")).collect();
    for (table, row) in
        [("bare", parameters.join(", ")), ("typed", parameters.join(" + 0, ") + " + 0")]
    {
        let types: Vec<String> = columns.iter().map(|name| format!("{name} double")).collect();
        world
            .execute(&format!(
                "create table {table} (position bigint primary key, {})",
                types.join(", ")
            ))
            .await;
        let insert = format!("insert into {table} (position, {list}) values (:position, {row})");
        let update = format!("update {table} set f0 = f0 + 0 where position = :position");
        for (name, statements) in
            [("together", vec![insert.as_str()]), ("alone", vec![insert.as_str(), &update])]
        {
            world.execute(&format!("delete from {table}")).await;
            world.execute("delete from projectors").await;
            assert_eq!(boot_file(&world, &file(&statements)).await, None, "{name}");
            let select = columns
                .iter()
                .map(|name| format!("cast({name} * 4 as signed)"))
                .collect::<Vec<_>>()
                .join(", ',', ");
            let sql = format!("select concat({select}) from {table} order by position");
            let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(sql))
                .fetch_all(&mut world.connection().await)
                .await
                .expect("the rows");
            let texts = expected
                .iter()
                .map(|quarters| quarters.iter().map(i64::to_string).collect::<Vec<_>>().join(","));
            assert!(texts.eq(rows), "{name} into {table}");
        }
    }
}

#[tokio::test]
async fn an_error_among_many_statements_names_the_file_and_line_of_its_statement() {
    let world = World::new().await;
    world.execute("create table a (k bigint primary key, s varchar(3))").await;
    let mut events: Vec<NewEvent> =
        (0..80).map(|number| of_payload(number, r#"{"s":"ok"}"#.into())).collect();
    events[49].payload = r#"{"s":"too long"}"#.into();
    world.store.append(&events).await.expect("appended");
    let text = file(&[
        "insert into a values (:position, 'x')",
        "update a set s = :payload.s where k = :position",
        "update a set s = concat(s, '') where k = :position",
    ]);
    let error = boot_file(&world, &text).await.expect("it is broken");
    assert!(error.contains("projector.toml:7") && error.contains("Data too long"), "{error}");
    assert_eq!(world.position("text").await, 49);
    assert_eq!(world.number("select count(*) from a where s = 'ok'").await, 49);
}

/// A comment at the end of a statement must not swallow the next statement of the packet.
#[tokio::test]
async fn a_statement_that_ends_in_a_comment_leaves_the_next_one_intact() {
    let world = World::new().await;
    world.execute("create table a (k varchar(40) primary key, n int)").await;
    world.store.append(&(0..5).map(event).collect::<Vec<_>>()).await.expect("appended");
    let text = file(&[
        "insert into a values (concat(:position, '-first'), 1) -- first ; do 1",
        "insert into a values (concat(:position, '-second'), 2) # second",
        "insert into a values (concat(:position, ';-third'), 3) /* third */ ;",
    ]);
    assert_eq!(boot_file(&world, &text).await, None);
    assert_eq!(world.number("select cast(sum(n) as unsigned) from a").await, 5 * 6);
}

#[tokio::test]
async fn an_iso_date_is_stored_in_utc_in_a_column_of_any_type() {
    let world = World::new().await;
    world
        .execute(
            "create table dates (k bigint primary key, at datetime(6) null, day date null, \
             moment timestamp(6) null, text varchar(40) null, seconds datetime(6) null, \
             n int not null default 0)",
        )
        .await;
    let insert = "insert into dates (k, at, day, moment, text, seconds) values (:position, \
                  :payload.at?|datetime, :payload.at?|date, :payload.at?|datetime, \
                  concat(:payload.at?|datetime, ''), :payload.ms?|unix_milliseconds)";
    let dates = [
        ("\"2024-05-01T10:00:00Z\"", Some("2024-05-01 10:00:00.000000"), "10:00:00"),
        ("\"2024-05-01T23:30:00.123-02:30\"", Some("2024-05-02 02:00:00.123000"), "02:00:00"),
        ("\"2024-05-01 10:00:00.5\"", Some("2024-05-01 10:00:00.500000"), "10:00:00"),
        ("\"2024-05-01\"", Some("2024-05-01 00:00:00.000000"), "00:00:00"),
        ("null", None, ""),
    ];
    let events: Vec<NewEvent> = (0..60)
        .map(|number| {
            let at = dates[number % dates.len()].0;
            of_payload(number, format!(r#"{{"at":{at},"ms":{}}}"#, number * 1_500))
        })
        .collect();
    world.store.append(&events).await.expect("appended");
    let update = "update dates set n = n + 1 where at <=> :payload.at?|datetime and k = :position";
    for (way, statements) in [("together", vec![insert]), ("alone", vec![insert, update])] {
        world.execute("delete from dates").await;
        world.execute("delete from projectors").await;
        assert_eq!(boot_file(&world, &file(&statements)).await, None, "{way}");
        type Row = (Option<String>, Option<String>, Option<String>, Option<String>, String, i64);
        let rows: Vec<Row> = sqlx::query_as(
            "select cast(at as char), cast(day as char), cast(moment as char), text, \
             cast(seconds as char), cast(n as signed) from dates order by k",
        )
        .fetch_all(&mut world.connection().await)
        .await
        .expect("the rows");
        assert_eq!(rows.len(), 60);
        for (number, (at, day, moment, text, seconds, n)) in rows.into_iter().enumerate() {
            let (_, expected, _) = dates[number % dates.len()];
            assert_eq!(at.as_deref(), expected, "{way}");
            assert_eq!(moment.as_deref(), expected, "{way}");
            assert_eq!(day.as_deref(), expected.map(|at| &at[..10]), "{way}");
            assert_eq!(text.as_deref(), expected, "{way}");
            let half = if number % 2 == 0 { "000000" } else { "500000" };
            let second = number * 3 / 2;
            assert_eq!(
                seconds,
                format!("1970-01-01 00:{:02}:{:02}.{half}", second / 60, second % 60),
                "{way}"
            );
            assert_eq!(n, i64::from(way == "alone"));
        }
    }
}

#[tokio::test]
async fn an_invalid_date_breaks_the_projector_with_the_parameter_and_an_example() {
    let world = World::new().await;
    world.execute("create table dates (k bigint primary key, at datetime(6))").await;
    world
        .store
        .append(&[of_payload(0, r#"{"at":"2024-05-01T10:00:00Z"}"#.into())])
        .await
        .expect("appended");
    // Without the cast, the server refuses the date, and the error says which cast to write.
    let bare = file(&["insert into dates values (:position, :payload.at)"]);
    let error = boot_file(&world, &bare).await.expect("it is broken");
    assert!(
        error.contains("projector.toml:4") && error.contains(":payload.at|datetime"),
        "{error}"
    );

    world.store.append(&[of_payload(1, r#"{"at":"tomorrow"}"#.into())]).await.expect("appended");
    let cast = file(&["insert into dates values (:position, :payload.at|datetime)"]);
    let error = boot_file(&world, &cast).await.expect("it is broken");
    assert!(
        error.contains("projector.toml:4: `:payload.at|datetime` is 'tomorrow', but must be")
            && error.contains("2024-05-01T10:00:00Z"),
        "{error}"
    );
    assert_eq!(world.position("text").await, 1);
}

/// Records the number of events in each of its batches.
struct Limited(Arc<Mutex<Vec<usize>>>);

#[async_trait]
impl Projector for Limited {
    fn name(&self) -> &str {
        "limited"
    }

    fn max_batch(&self) -> usize {
        3
    }

    async fn handle(&self, _: &Event, _: &mut MySqlConnection) -> anyhow::Result<()> {
        Ok(())
    }

    async fn handle_batch(&self, events: &[&Event], _: &mut MySqlConnection) -> anyhow::Result<()> {
        self.0.lock().expect("no panic").push(events.len());
        Ok(())
    }
}

#[tokio::test]
async fn a_projector_receives_at_most_as_many_events_at_once_as_it_allows() {
    let world = World::new().await;
    world.append(8).await;
    let batches = Arc::new(Mutex::new(Vec::new()));
    let registry = Registry::new().with(Limited(Arc::clone(&batches))).expect("a name");
    assert!(world.boot(&registry).await.is_released());
    assert_eq!(world.position("limited").await, 8);
    assert_eq!(*batches.lock().expect("no panic"), [3, 3, 2]);
}
