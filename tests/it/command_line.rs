//! The command line as a contract: the output, exit code and error messages of each command.

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
mod terminal;

use std::time::Duration;

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};

use crate::support::{Session, World, eventually, execute};

/// A projector file that records each event in a table without a unique key, so that repetitions
/// show.
fn tally(name: &str) -> String {
    tally_with(name, "mode = 'from_beginning'", ":position")
}

/// Like [`tally`], with other keys and another expression for the recorded position.
fn tally_with(name: &str, keys: &str, position: &str) -> String {
    format!(
        "name = '{name}'\nversion = 1\n{keys}\n\
         setup = ['create table if not exists {name} (seq bigint auto_increment primary key, \
         position bigint not null)']\n\
         teardown = ['drop table if exists {name}']\n\n\
         [[on]]\nevents = ['*']\nsql = 'insert into {name} (position) values ({position})'\n"
    )
}

/// Like [`tally`], but it fails at `position`, because the column does not accept null.
fn failing_at(name: &str, position: u64) -> String {
    tally_with(name, "mode = 'from_beginning'", &format!("nullif(:position, {position})"))
}

/// Like [`tally`], but it waits at its first event while the row of the table `gate` is locked.
fn gated(name: &str) -> String {
    format!("{}\n[[on]]\nevents = ['*']\nsql = 'update gate set n = n + 1'\n", tally(name))
}

/// Creates the gate and locks it until the returned connection's transaction ends.
async fn close_gate(world: &World) -> MySqlConnection {
    world.execute("create table gate (n int)").await;
    world.execute("insert into gate values (0)").await;
    let mut keeper = world.connection().await;
    execute(&mut keeper, "start transaction").await;
    execute(&mut keeper, "select n from gate for update").await;
    keeper
}

/// Waits until a handler waits at the gate.
async fn wait_for_gated_handler(world: &World) {
    let waits = |session: &Session| session.statement.starts_with("update gate");
    eventually("a handler waits at the gate", async || world.sessions().await.iter().any(waits))
        .await;
}

/// The positions that such a projector has recorded, in order.
async fn tally_positions(world: &World, name: &str) -> Vec<u64> {
    let sql = format!("select cast(position as unsigned) from {name} order by seq");
    sqlx::query_scalar(AssertSqlSafe(sql))
        .fetch_all(&mut world.connection().await)
        .await
        .expect("the table exists")
}

/// Asserts that the ledger's row of a projector names the event at which it failed.
async fn assert_failed_at(world: &World, name: &str, position: u64) {
    let mut connection = world.connection().await;
    let failed = format!(
        "select failed_position, failed_event_id, failed_event_type from projectors \
         where name = '{name}' and status = 'broken'"
    );
    let event =
        format!("select position, event_id, event_type from events where position = {position}");
    let [failed, event]: [(u64, String, String); 2] = [
        sqlx::query_as(AssertSqlSafe(failed))
            .fetch_one(&mut connection)
            .await
            .expect("the projector broke at an event"),
        sqlx::query_as(AssertSqlSafe(event))
            .fetch_one(&mut connection)
            .await
            .expect("the event is in the log"),
    ];
    assert_eq!(failed, event, "{name}");
}

/// The number of events in the log, without fillers.
async fn event_count(world: &World) -> u64 {
    world.number("select count(*) from events where event_type not like '$%'").await
}

/// A line for `append`.
fn line(stream: &str) -> String {
    format!(r#"{{"stream_id":"{stream}","event_type":"Opened","payload":{{}}}}"#)
}

/// Panics after ten seconds: the future must have waited for a lock or a timeout.
async fn with_short_timeout<T>(doing: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), doing).await.expect("the future does not wait")
}
