//! The environment of each test: its own database and queue, on real servers.

mod faulty_queue;
mod folder;
mod foreign_writer;
mod gate;
mod gateway;
mod lambda;
mod own_server;
mod play_task;
mod process;
mod proxy;
mod scripted_projector;
mod sessions;
mod sqs_stub;
mod tally;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_sqs::types::QueueAttributeName;
use futures_util::{StreamExt, stream};
use projectionist::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection, Row};
use projectionist::{
    BackgroundLimits, BootReport, Database, Entry, EventStore, Ledger, Limits, NewEvent,
    PlayReport, PlaySettings, ProjectorId, Queue, Registry, RelaySettings, SqsQueue, Status, boot,
    play,
};

pub use faulty_queue::{Faults, FaultyQueue};
pub use folder::Folder;
pub use foreign_writer::{server_error, write};
pub use gate::Gate;
pub use gateway::{AuthMode, Gateway, certificate, tls_acceptor};
pub use lambda::{Function, Runtime, schedule};
pub use own_server::OwnServer;
pub use process::{FinishedProcess, PipedProcess, RunningProcess};
pub use proxy::{Proxy, ProxyAction, RandomCuts, contains_text, is_commit};
pub use scripted_projector::{ScriptedProjector, gated, registry_of, run, scripted_at};
pub use sessions::{Session, kill, sessions};
pub use sqs_stub::SqsStub;
pub use tally::{Tally, registry};

/// Longer than any step of a test takes on a busy machine. Reaching it is a failure.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// A database and a queue that no other test uses.
pub struct World {
    pub database_name: String,
    pub database_url: String,
    pub queue_url: String,
    pub database: Database,
    pub store: EventStore,
    pub ledger: Ledger,
    pub queue: Arc<SqsQueue>,
    pub sqs: aws_sdk_sqs::Client,
}

impl World {
    /// Creates a world with a FIFO queue.
    pub async fn new() -> Self {
        Self::with_queue(true, &[]).await
    }

    /// Creates a world with a standard queue.
    pub async fn with_standard_queue() -> Self {
        Self::with_queue(false, &[]).await
    }

    /// Creates a world with a queue of these attributes.
    pub async fn with_queue(fifo: bool, attributes: &[(QueueAttributeName, &str)]) -> Self {
        start_logs();
        let database_name = format!("test_{}", uuid::Uuid::now_v7().simple());
        let mut server = server_connection().await;
        execute(&mut server, &format!("create database {database_name}")).await;
        let database_url = format!("{}/{database_name}", server_url());
        let database = Database::connect(&without_tls(&database_url), 16, TIMEOUT)
            .await
            .expect("the server answers");
        database.migrate().await.expect("the tables are created");

        let sqs = sqs_client().await;
        let name = format!("{database_name}{}", if fifo { ".fifo" } else { "" });
        let mut create = sqs.create_queue().queue_name(name);
        if fifo {
            create = create.attributes(QueueAttributeName::FifoQueue, "true");
        }
        for (attribute, value) in attributes {
            create = create.attributes(attribute.clone(), *value);
        }
        let created = create.send().await.expect("the queue is created");
        let queue_url = created.queue_url.expect("a queue has a URL");
        let queue = SqsQueue::with_client(sqs.clone(), &queue_url, Duration::from_secs(30))
            .await
            .expect("the queue answers");
        World {
            store: EventStore::new(&database),
            ledger: Ledger::new(&database),
            queue: Arc::new(queue),
            database_name,
            database_url,
            queue_url,
            database,
            sqs,
        }
    }

    /// Opens a separate connection to the world's database, as a foreign writer would.
    pub async fn connection(&self) -> MySqlConnection {
        connect(&self.database_url).await
    }

    /// Appends `count` events of ten streams and three types in turn.
    pub async fn append(&self, count: usize) {
        let events: Vec<NewEvent> = (0..count).map(event).collect();
        for chunk in events.chunks(500) {
            self.store.append(chunk).await.expect("the events are appended");
        }
    }

    /// Boots in this process.
    pub async fn boot(&self, registry: &Registry) -> BootReport {
        let limits = Limits::default().with_batch(100);
        boot(&self.database, registry, limits, |_| {}).await.expect("boot succeeds")
    }

    /// Boots without waiting while the high-water mark is blocked below the end of the log. Asserts
    /// that the projectors are not released.
    pub async fn boot_while_blocked(&self, registry: &Registry) {
        let limits = Limits::default().with_batch(100).with_retry_timeout(Some(Duration::ZERO));
        let report = boot(&self.database, registry, limits, |_| {}).await.expect("boot succeeds");
        assert!(!report.is_released(), "events above the blocked mark are visible: {report:?}");
    }

    /// Plays in this process until idle, from the real queue.
    pub async fn play_until_idle(&self, registry: &Registry) -> PlayReport {
        self.play_from(Arc::clone(&self.queue) as Arc<dyn Queue>, registry).await
    }

    /// Plays in this process until idle, from the given queue.
    pub async fn play_from(&self, queue: Arc<dyn Queue>, registry: &Registry) -> PlayReport {
        self.play_with(queue, registry, Self::play_settings()).await
    }

    /// Plays in this process until idle, from the given queue, with these settings.
    pub async fn play_with(
        &self,
        queue: Arc<dyn Queue>,
        registry: &Registry,
        settings: PlaySettings,
    ) -> PlayReport {
        let playing = play(&self.database, queue, registry, settings, std::future::pending());
        let played = tokio::time::timeout(TIMEOUT * 2, playing).await.expect("play becomes idle");
        played.expect("play succeeds")
    }

    /// Settings that stop when idle and find lost messages quickly.
    pub fn play_settings() -> PlaySettings {
        PlaySettings::default()
            .with_limits(Limits::default().with_batch(100))
            .with_relay(Some(
                RelaySettings::default()
                    .with_interval(Duration::from_millis(10))
                    .with_max_events(20),
            ))
            .with_receive_wait(Duration::from_secs(1))
            .with_reconcile_after(Duration::from_secs(1))
            .with_background_after(BackgroundLimits::default())
            .with_until_idle(true)
            .with_grace_period(Duration::from_secs(5))
    }

    /// The ledger's entry of a projector of version 1.
    pub async fn entry(&self, name: &str) -> Option<Entry> {
        let id = ProjectorId { name: name.into(), version: 1 };
        self.ledger
            .entries()
            .await
            .expect("the ledger is readable")
            .into_iter()
            .find(|entry| entry.id == id)
    }

    /// The status of a projector of version 1; `new` if the ledger has no entry.
    pub async fn status(&self, name: &str) -> String {
        self.entry(name).await.map_or("new".into(), |entry| entry.status.to_string())
    }

    /// The position of a projector of version 1.
    pub async fn position(&self, name: &str) -> u64 {
        self.entry(name).await.expect("the projector is in the ledger").position.get()
    }

    /// The last position of the log.
    pub async fn last_position(&self) -> u64 {
        self.number("select cast(coalesce(max(position), 0) as unsigned) from events").await
    }

    /// One number from the database.
    pub async fn number(&self, sql: &str) -> u64 {
        let row = sqlx::query(AssertSqlSafe(sql))
            .fetch_one(&mut self.connection().await)
            .await
            .expect(sql);
        row.try_get::<i64, _>(0)
            .map(|n| n as u64)
            .or_else(|_| row.try_get::<u64, _>(0))
            .expect("the value is a number")
    }

    /// Runs a statement.
    pub async fn execute(&self, sql: &str) {
        execute(&mut self.connection().await, sql).await;
    }

    /// The stored high-water mark.
    pub async fn high_water(&self) -> u64 {
        self.number("select high_water from event_log").await
    }

    /// The number of transactions in the world's database that wait for a lock.
    /// `information_schema.innodb_trx` cannot be used: the server refreshes it only when it has not
    /// been read for 0.1 s.
    pub async fn lock_waits(&self) -> usize {
        let mut connection = self.connection().await;
        let sessions: Vec<u64> = self.sessions().await.iter().map(|session| session.id).collect();
        let status = sqlx::raw_sql("show engine innodb status")
            .fetch_one(&mut connection)
            .await
            .expect("the status");
        let status: String = status.try_get(2).expect("the status is text");
        let waiting = status
            .split("---TRANSACTION")
            .filter(|transaction| transaction.contains("\nLOCK WAIT "));
        let session = |transaction: &str| -> Option<u64> {
            transaction.split_once(" thread id ")?.1.split(',').next()?.parse().ok()
        };
        waiting.filter_map(session).filter(|session| sessions.contains(session)).count()
    }

    /// Asserts the oracle of all fault tests: the projector's read model equals a fold of the log
    /// up to its position. It holds each subscribed event once, in order.
    pub async fn assert_folded(&self, tally: &Tally) {
        let position = self.position(tally.name()).await;
        assert_eq!(
            tally.applied(self).await,
            tally.expected(self, position).await,
            "{} at {position}",
            tally.name()
        );
    }

    /// Asserts that a projector broke at this position with this reason.
    pub async fn assert_broken(&self, name: &str, at: u64, because: &str) {
        let entry = self.entry(name).await.expect("the projector is in the ledger");
        let Status::Broken(failure) = &entry.status else { panic!("{name} is {}", entry.status) };
        let event = failure.event.as_ref().expect("the projector failed at an event");
        assert_eq!((event.position.get(), entry.position.get()), (at, at - 1), "{failure:?}");
        assert!(failure.error.contains(because), "{:?} does not say {because:?}", failure.error);
    }

    /// Asserts the oracle, and that the projector's position is the end of the log.
    pub async fn assert_complete(&self, tally: &Tally) {
        assert_eq!(
            self.position(tally.name()).await,
            self.last_position().await,
            "{} is not at the end",
            tally.name()
        );
        self.assert_folded(tally).await;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "kept for inspection: database {}, queue {}",
                self.database_url, self.queue_url
            );
            return;
        }
        let (name, queue_url) = (self.database_name.clone(), self.queue_url.clone());
        let clean = async move {
            let mut server = server_connection().await;
            // The test's own connections may still hold locks, because its runtime is blocked until
            // this function returns.
            let sessions = sessions(&mut server).await;
            kill(&mut server, sessions.into_iter().filter(|session| session.database == name))
                .await;
            execute(&mut server, &format!("drop database {name}")).await;
            // The test's client cannot be used: its connections belong to the blocked runtime.
            let _ = sqs_client().await.delete_queue().queue_url(queue_url).send().await;
        };
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
        let cleaned =
            std::thread::spawn(move || runtime().map(|runtime| runtime.block_on(clean))).join();
        assert!(cleaned.is_ok(), "the test's database was not dropped");
    }
}

/// The event with this number, counted from 0.
pub fn event(number: usize) -> NewEvent {
    NewEvent {
        event_id: None,
        stream_id: format!("case-{}", number % 10),
        stream_version: None,
        event_type: ["Opened", "Amended", "Closed"][number % 3].into(),
        recorded_at: None,
        payload: format!("{{\"number\":{number}}}"),
        metadata: None,
    }
}

/// Waits until a condition holds. Panics with `what` after [`TIMEOUT`].
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < TIMEOUT, "still not true after {TIMEOUT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs `work` for each item, for at most `limit` items at once. A test whose cases are independent
/// waits for them side by side.
pub async fn side_by_side<T, F: Future<Output = ()>>(
    limit: usize,
    items: impl IntoIterator<Item = T>,
    work: impl FnMut(T) -> F,
) {
    stream::iter(items).map(work).buffer_unordered(limit).collect::<()>().await;
}

/// The seed of a test's random numbers: TEST_SEED, or a new one. It is printed with a failing
/// test's output.
pub fn seed() -> u64 {
    seed_or(fastrand::u64(..))
}

/// Like [`seed`], with `default` instead of a new seed.
pub fn seed_or(default: u64) -> u64 {
    let seed = std::env::var("TEST_SEED")
        .map_or(default, |seed| seed.parse().expect("TEST_SEED is a number"));
    eprintln!("repeat with TEST_SEED={seed}");
    seed
}

/// Whether the server is MariaDB. The tests that differ between the servers say why.
pub async fn is_mariadb() -> bool {
    let version: String = sqlx::query_scalar("select version()")
        .fetch_one(&mut server_connection().await)
        .await
        .expect("the server has a version");
    version.contains("MariaDB")
}

/// Writes the log of the code under test to the test's output if PROJECTIONIST_LOG is set.
fn start_logs() {
    if let Ok(filter) = std::env::var("PROJECTIONIST_LOG") {
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    }
}

/// Runs a statement.
pub async fn execute(connection: &mut MySqlConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(connection)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

async fn server_connection() -> MySqlConnection {
    connect(&server_url()).await
}

/// Opens a connection of the test itself.
pub async fn connect(url: &str) -> MySqlConnection {
    MySqlConnection::connect(&without_tls(url)).await.expect("the server answers")
}

/// The URL for a connection of this process. MySQL's handshake of TLS waits 40 ms for a delayed
/// acknowledgement, and a test opens many connections. The processes that a test starts use TLS.
pub fn without_tls(url: &str) -> String {
    format!("{url}?ssl-mode=DISABLED")
}

/// The server under test, without a database: TEST_DATABASE_URL, or the MariaDB of `localstack/up`.
pub fn server_url() -> String {
    setting("TEST_DATABASE_URL")
        .or_else(|| setting("MARIADB_URL"))
        .expect("MARIADB_URL is set: run localstack/test")
}

pub async fn sqs_client() -> aws_sdk_sqs::Client {
    let endpoint =
        setting("AWS_ENDPOINT_URL").expect("AWS_ENDPOINT_URL is set: run localstack/test");
    let http = aws_smithy_http_client::Builder::new().build_http();
    let config = aws_config::defaults(aws_config::BehaviorVersion::latest())
        .http_client(http)
        .region("us-east-1")
        .endpoint_url(endpoint)
        .test_credentials()
        .load()
        .await;
    aws_sdk_sqs::Client::new(&config)
}

/// A variable of the environment, or of the file that `localstack/up` wrote last.
pub fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().or_else(|| {
        let text =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/.local/env")).ok()?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("export ")?.strip_prefix(name)?.strip_prefix('='))?;
        Some(line.trim_matches(['\'', '"']).to_owned())
    })
}
