//! Applications that append: processes of this program, which use plain SQL as any language could,
//! and `projectionist append`.

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

/// The number of events that are in the log before the first release.
const HISTORY: usize = 10_000;

/// The percentage of transactions that roll back.
const ROLLBACKS: u8 = 15;

/// The outcomes of a writer's transactions, one line per event: `+` committed, `-` rolled back. A
/// transaction whose commit was not acknowledged has no line.
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

// — plain SQL —

/// Appends until SIGTERM. After each error, continues on a new connection with a new stream.
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
    // A new stream, because the last transaction of the previous stream may have been stored.
    let stream = format!("{name}-{}", Uuid::now_v7().simple());
    let mut version = 0;
    loop {
        version = transaction(&mut connection, &stream, version, record).await?;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(2..40))).await;
    }
}

/// One transaction: one or two statements with a few rows each, a pause, and a commit or a
/// rollback. Returns the last version of the stream.
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

/// An insert of rows, or an insert of a selection, for which the server does not know the number of
/// positions in advance.
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

// — `projectionist append` —

/// Runs one `append`, which receives a few lines at a time, on streams that others also append to.
pub async fn append(
    processes: &Arc<ProcessTable>,
    name: &str,
    record: &mut Record,
) -> anyhow::Result<()> {
    let (process, stdin) = processes.start(Kind::Append, name, &["append"])?;
    let mut stdin = stdin.context("append has no standard input")?;
    let mut ids = Vec::new();
    for _ in 0..fastrand::u8(1..10) {
        let lines: String = (0..fastrand::u8(1..6)).map(|_| line(&mut ids)).collect();
        // The process may have been killed. Then the number of stored events is unknown.
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

/// The events before the first release. There are enough of them for a fault to strike during the
/// boot of a new projector.
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

/// Appends an event with which the hostile projector damages its session or ends its transaction.
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
    sqlx::query(
        "insert into events (stream_id, stream_version, event_type, payload) \
         values (?, 1, 'Provoked', ?)",
    )
    .bind(stream)
    .bind(payload)
    .execute(connection)
    .await?;
    Ok(())
}

/// Appends an event without an amount, on which the fragile projector breaks.
pub async fn append_bad_event(connection: &mut MySqlConnection) -> anyhow::Result<()> {
    let stream = format!("bad-{}", Uuid::now_v7().simple());
    sqlx::query(
        "insert into events (stream_id, stream_version, event_type, payload) \
         values (?, 1, 'Amended', '{}')",
    )
    .bind(stream)
    .execute(connection)
    .await?;
    Ok(())
}
