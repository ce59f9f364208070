//! The command line as a contract: what each command prints, how it exits, and what it says when it
//! cannot.

mod append;
mod bad_input;
mod boot;
mod cloudwatch;
mod custom_binary;
mod kill;
mod play;
mod retire;
mod rolling_deploy;
mod secrets;
mod status;

use std::time::Duration;

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};

use crate::support::{Session, World, eventually, execute};

/// A projector that writes down each event that it is shown: a repetition would be seen.
fn tally(name: &str) -> String {
    tally_with(name, "mode = 'from_beginning'", ":position")
}

/// The same, with other keys and with another expression for what it writes down.
fn tally_with(name: &str, keys: &str, position: &str) -> String {
    format!(
        "name = '{name}'\nversion = 1\n{keys}\n\
         setup = ['create table if not exists {name} (seq bigint auto_increment primary key, position bigint not null)']\n\
         teardown = ['drop table if exists {name}']\n\n\
         [[on]]\nevents = ['*']\nsql = 'insert into {name} (position) values ({position})'\n"
    )
}

/// The same, failing at a position: its column takes no null.
fn failing_at(name: &str, position: u64) -> String {
    tally_with(name, "mode = 'from_beginning'", &format!("nullif(:position, {position})"))
}

/// The same, waiting at its first event while somebody holds the row of the table `gate`.
fn gated(name: &str) -> String {
    format!("{}\n[[on]]\nevents = ['*']\nsql = 'update gate set n = n + 1'\n", tally(name))
}

/// Makes the gate, and holds it until what this returns is ended.
async fn close_gate(world: &World) -> MySqlConnection {
    world.execute("create table gate (n int)").await;
    world.execute("insert into gate values (0)").await;
    let mut keeper = world.connection().await;
    execute(&mut keeper, "start transaction").await;
    execute(&mut keeper, "select n from gate for update").await;
    keeper
}

/// Waits until a handler stands at the gate.
async fn wait_for_gated_handler(world: &World) {
    let waits = |session: &Session| session.statement.starts_with("update gate");
    eventually("a handler stands at the gate", async || world.sessions().await.iter().any(waits))
        .await;
}

/// What such a projector has written down, in its order.
async fn tally_positions(world: &World, name: &str) -> Vec<u64> {
    let sql = format!("select cast(position as unsigned) from {name} order by seq");
    sqlx::query_scalar(AssertSqlSafe(sql))
        .fetch_all(&mut world.connection().await)
        .await
        .expect("its table")
}

/// Asserts that the ledger's row of a projector names the event that it failed on, as it is in the
/// log.
async fn assert_failed_at(world: &World, name: &str, position: u64) {
    let mut connection = world.connection().await;
    let failed = format!(
        "select failed_position, failed_event_id, failed_event_type from projectors where name = '{name}' and status = 'broken'"
    );
    let event =
        format!("select position, event_id, event_type from events where position = {position}");
    let [failed, event]: [(u64, String, String); 2] = [
        sqlx::query_as(AssertSqlSafe(failed))
            .fetch_one(&mut connection)
            .await
            .expect("it is broken, at an event"),
        sqlx::query_as(AssertSqlSafe(event))
            .fetch_one(&mut connection)
            .await
            .expect("it is in the log"),
    ];
    assert_eq!(failed, event, "{name}");
}

/// Events in the log, without those that only fill a position.
async fn event_count(world: &World) -> u64 {
    world.number("select count(*) from events where event_type not like '$%'").await
}

/// A line that `append` takes.
fn line(stream: &str) -> String {
    format!(r#"{{"stream_id":"{stream}","event_type":"Opened","payload":{{}}}}"#)
}

/// Fails where this takes so long that it must have waited for a lock or a time-out.
async fn with_short_timeout<T>(doing: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), doing).await.expect("it waits for nothing")
}
