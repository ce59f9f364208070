//! Applications that append: by plain SQL, as any language may, in processes of their own; and by
//! `projectionist append`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use projectionist::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::signal::unix::{SignalKind, signal};
use uuid::Uuid;

use crate::process::{Kind, ProcessTable};

const TYPES: [&str; 3] = ["Opened", "Amended", "Closed"];

const HISTORY: usize = 10_000;

/// How many of a hundred transactions roll back.
const ROLLBACKS: u8 = 15;

/// What became of a writer's transactions, a line for each event: `+` committed, `-` rolled back.
/// One whose commit nobody acknowledged is in neither.
pub struct Record(File);

impl Record {
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        Ok(Record(
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .context("the writer's record")?,
        ))
    }

    fn append_line(&mut self, sign: char, ids: &[String]) -> anyhow::Result<()> {
        let lines: String = ids.iter().map(|id| format!("{sign}{id}\n")).collect();
        Ok(self.0.write_all(lines.as_bytes())?)
    }
}

// — by plain SQL —

/// The process: appends until SIGTERM, and begins again on a new connection and a new stream after
/// every error.
pub async fn write(name: &str, record: &Path) -> anyhow::Result<()> {
    let url = std::env::var("DATABASE_URL").context("DATABASE_URL")?;
    let mut record = Record::open(record)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let writing = async {
        loop {
            let Err(error) = session(&url, name, &mut record).await;
            eprintln!("{error:#}");
            tokio::time::sleep(Duration::from_millis(fastrand::u64(50..500))).await;
        }
    };
    tokio::select! {
        () = writing => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

async fn session(
    url: &str,
    name: &str,
    record: &mut Record,
) -> anyhow::Result<std::convert::Infallible> {
    let mut connection = MySqlConnection::connect(url).await?;
    sqlx::raw_sql("set session innodb_lock_wait_timeout = 3").execute(&mut connection).await?;
    // A stream of its own: nobody knows which of the last one's events were stored.
    let stream = format!("{name}-{}", Uuid::now_v7().simple());
    let mut version = 0;
    loop {
        version = transaction(&mut connection, &stream, version, record).await?;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(2..40))).await;
    }
}

/// One transaction: a few rows in one statement or several, a pause, and a commit or not.
async fn transaction(
    connection: &mut MySqlConnection,
    stream: &str,
    version: u64,
    record: &mut Record,
) -> anyhow::Result<u64> {
    let mut transaction = connection.begin().await?;
    let (mut ids, mut last) = (Vec::new(), version);
    for _ in 0..fastrand::u8(1..3) {
        let count = fastrand::u64(1..5);
        let added: Vec<String> = (0..count).map(|_| Uuid::now_v7().to_string()).collect();
        sqlx::raw_sql(AssertSqlSafe(insert(stream, last, &added)))
            .execute(&mut *transaction)
            .await?;
        ids.extend(added);
        last += count;
    }
    let pause = match fastrand::u8(0..100) {
        0..60 => 0,
        60..97 => fastrand::u64(1..50),
        _ => fastrand::u64(500..2_000),
    };
    tokio::time::sleep(Duration::from_millis(pause)).await;
    if fastrand::u8(0..100) < ROLLBACKS {
        transaction.rollback().await?;
        record.append_line('-', &ids)?;
        return Ok(version);
    }
    transaction.commit().await?;
    record.append_line('+', &ids)?;
    Ok(last)
}

/// As rows, or as a selection: of that the server does not know beforehand how many positions it
/// takes.
fn insert(stream: &str, version: u64, ids: &[String]) -> String {
    let rows = ids.iter().enumerate().map(|(index, id)| {
        let event_type = TYPES[fastrand::usize(..TYPES.len())];
        let payload = json!({ "amount": fastrand::u32(..1_000) });
        format!("'{id}', '{stream}', {}, '{event_type}', '{payload}'", version + 1 + index as u64)
    });
    let columns = "insert into events (event_id, stream_id, stream_version, event_type, payload)";
    match fastrand::u8(0..100) {
        0..10 => {
            format!(
                "{columns} {}",
                rows.map(|row| format!("select {row}")).collect::<Vec<_>>().join(" union all ")
            )
        }
        _ => format!(
            "{columns} values {}",
            rows.map(|row| format!("({row})")).collect::<Vec<_>>().join(", ")
        ),
    }
}

// — by `projectionist append` —

/// Runs one `append`, fed a few lines at a time, on streams that others write to as well.
pub async fn append(
    processes: &Arc<ProcessTable>,
    name: &str,
    record: &mut Record,
) -> anyhow::Result<()> {
    let (process, stdin) = processes.start(Kind::Append, name, &["append"])?;
    let mut stdin = stdin.context("it has a pipe")?;
    let mut ids = Vec::new();
    for _ in 0..fastrand::u8(1..10) {
        let lines: String = (0..fastrand::u8(1..6)).map(|_| line(&mut ids)).collect();
        // It may have been killed: then nobody knows how much it stored.
        if stdin.write_all(lines.as_bytes()).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(20..200))).await;
    }
    drop(stdin);
    if process.wait().await.code == Some(0) {
        record.append_line('+', &ids)?;
    }
    Ok(())
}

/// What happened before the first release: enough that the boot of a newcomer can be struck in the
/// middle.
pub fn history() -> String {
    let mut ids = Vec::new();
    (0..HISTORY).map(|_| line(&mut ids)).collect()
}

fn line(ids: &mut Vec<String>) -> String {
    let id = Uuid::now_v7().to_string();
    let event = json!({
        "event_id": id,
        "stream_id": format!("shared-{}", fastrand::u8(..5)),
        "event_type": TYPES[fastrand::usize(..TYPES.len())],
        "payload": { "amount": fastrand::u32(..1_000) },
    });
    ids.push(id);
    format!("{event}\n")
}

/// What makes the hostile projector do harm to its session, or end its transaction.
pub async fn append_harmful_event(connection: &mut MySqlConnection) -> anyhow::Result<()> {
    const HARMS: [&str; 9] = [
        "time_zone",
        "sql_mode",
        "limit",
        "isolation",
        "charset",
        "error",
        "rollback",
        "commit",
        "commit",
    ];
    let stream = format!("harm-{}", Uuid::now_v7().simple());
    let payload = json!({ "harm": HARMS[fastrand::usize(..HARMS.len())] }).to_string();
    sqlx::query("insert into events (stream_id, stream_version, event_type, payload) values (?, 1, 'Provoked', ?)")
        .bind(stream)
        .bind(payload)
        .execute(connection)
        .await?;
    Ok(())
}

/// What the fragile projector has not thought of.
pub async fn append_bad_event(connection: &mut MySqlConnection) -> anyhow::Result<()> {
    let stream = format!("bad-{}", Uuid::now_v7().simple());
    sqlx::query("insert into events (stream_id, stream_version, event_type, payload) values (?, 1, 'Amended', '{}')")
        .bind(stream)
        .execute(connection)
        .await?;
    Ok(())
}
