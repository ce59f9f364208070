//! The life of a system, with the shipped binary: events are appended all the time, and a second
//! release brings a third projector. At the end, each read model equals a fold of the log.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use projectionist::sqlx::{self, AssertSqlSafe};
use serde_json::Value;

use crate::support::{Folder, PipedProcess, RunningProcess, World, eventually, seed};

/// A repetition changes a count or adds a row in each of the three tables. No unique key rejects or
/// hides it.
const CASE_STATUS: &str = r#"
name = "case_status"
version = 1
mode = "from_beginning"
setup = ["""create table if not exists case_status (
            case_id varchar(200) collate utf8mb4_bin primary key,
            last_event varchar(200) not null, at datetime(6) not null, events int not null)"""]
teardown = ["drop table if exists case_status"]

[[on]]
events = ["*"]
sql = """insert into case_status (case_id, last_event, at, events)
         values (:stream_id, :event_type, :recorded_at, 1)
         on duplicate key update
             last_event = values(last_event), at = values(at), events = events + 1"""
"#;

const JOURNAL: &str = r#"
name = "journal"
version = 1
mode = "from_beginning"
setup = ["""create table if not exists journal (
            seq bigint auto_increment primary key, position bigint not null, case_id varchar(200),
            version int, event_type varchar(200), channel varchar(100))"""]
teardown = ["drop table if exists journal"]

[[on]]
events = ["*"]
sql = """insert into journal (position, case_id, version, event_type, channel)
         values (:position, :stream_id, :stream_version, :event_type, :payload.channel)"""
"#;

/// Deployed later. Its second statement needs the row of its first.
const WORKLOAD: &str = r#"
name = "workload"
version = 1
mode = "from_beginning"
setup = ["""create table if not exists workload (resource varchar(100) collate utf8mb4_bin,
            team varchar(100) collate utf8mb4_bin, events int not null, receipts int not null,
            primary key (resource, team))"""]
teardown = ["drop table if exists workload"]

[[on]]
events = ["*"]
sql = """insert into workload
         values (:payload.org_resource, coalesce(:payload.group?, 'none'), 1, 0)
         on duplicate key update events = events + 1"""

[[on]]
events = ["Confirmation of receipt"]
sql = """update workload set receipts = receipts + 1
         where resource = :payload.org_resource and team = coalesce(:payload.group?, 'none')"""
"#;

/// Lines for `append`.
type Log = Vec<String>;

/// The lines of the file that `EVENTS_FILE` names, or `count` generated events. Each line needs the
/// fields of a generated event.
fn log(count: usize, dice: &mut fastrand::Rng) -> Log {
    match std::env::var("EVENTS_FILE") {
        Ok(path) => {
            let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
            text.lines().map(str::to_owned).collect()
        }
        Err(_) => generated_events(count, dice),
    }
}

/// Generated events: interleaved cases, missing fields, and text that is not
/// ASCII.
fn generated_events(count: usize, dice: &mut fastrand::Rng) -> Log {
    let types = [
        "Confirmation of receipt",
        "T02 Check confirmation of receipt",
        "Größe \"ändern\"",
        "T06 ?:payload",
    ];
    let event = |number: usize| {
        let mut payload = serde_json::json!({
            "channel": dice.choice(["Internet", "Desk", "Post", "E-mail"]),
            "org_resource": format!("Resource{:02}", dice.u8(1..20)),
        });
        match dice.u8(0..3) {
            0 => {}
            1 => payload["group"] = Value::Null,
            _ => payload["group"] = format!("Group {}", dice.u8(1..5)).into(),
        }
        let (minute, second) = (number / 60 % 60, number % 60);
        serde_json::json!({
            "stream_id": format!("case-{}", dice.u16(1..200)),
            "event_type": types[dice.usize(..types.len())],
            "recorded_at": format!(
                "2010-10-02T07:{minute:02}:{second:02}.{:06}Z",
                dice.u32(..1_000_000)
            ),
            "payload": payload,
        })
        .to_string()
    };
    (0..count).map(event).collect()
}

/// The three read models, as rows of text.
#[derive(Debug, PartialEq, Eq)]
struct Models {
    case_status: Vec<String>,
    journal: Vec<String>,
    workload: Vec<String>,
}

/// The expected read models, computed from the lines alone.
fn fold(log: &[String]) -> Models {
    let (mut cases, mut journal) = (BTreeMap::<String, (u64, String)>::new(), Vec::new());
    let mut work = BTreeMap::<String, (u64, u64)>::new();
    for line in log {
        let event: Value = serde_json::from_str(line).expect("the line is JSON");
        let text = |path: &str| event.pointer(path).and_then(Value::as_str).map(str::to_owned);
        let required = |path: &str| text(path).unwrap_or_else(|| panic!("{path} in {line}"));
        let (case, event_type) = (required("/stream_id"), required("/event_type"));

        let (version, last) = cases.entry(case.clone()).or_default();
        *version += 1;
        *last = format!("{event_type}|{}", required("/recorded_at"));
        journal.push(format!("{case}|{version}|{event_type}|{}", required("/payload/channel")));

        let team = text("/payload/group").unwrap_or("none".into());
        let (events, receipts) =
            work.entry(format!("{}|{team}", required("/payload/org_resource"))).or_default();
        *events += 1;
        *receipts += u64::from(event_type == "Confirmation of receipt");
    }
    let case_status =
        cases.into_iter().map(|(case, (events, last))| format!("{case}|{last}|{events}"));
    let workload =
        work.into_iter().map(|(who, (events, receipts))| format!("{who}|{events}|{receipts}"));
    Models { case_status: sorted(case_status), journal, workload: sorted(workload) }
}

async fn read(world: &World) -> Models {
    let rows = async |sql: &str| -> Vec<String> {
        sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_all(&mut world.connection().await)
            .await
            .expect(sql)
    };
    let positions: Vec<i64> = sqlx::query_scalar("select position from journal order by seq")
        .fetch_all(&mut world.connection().await)
        .await
        .expect("the journal is readable");
    assert!(positions.is_sorted_by(|a, b| a < b), "an event was repeated or out of order");
    let case_status = rows(
        "select concat_ws('|', case_id, last_event, date_format(at, '%Y-%m-%dT%H:%i:%s.%fZ'), \
         events) from case_status",
    );
    Models {
        case_status: sorted(case_status.await),
        journal: rows(
            "select concat_ws('|', case_id, version, event_type, channel) from journal \
             order by seq",
        )
        .await,
        workload: sorted(
            rows(
                "select concat_ws('|', resource, team, events, receipts) \
                 from workload",
            )
            .await,
        ),
    }
}

fn sorted(rows: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut rows: Vec<String> = rows.into_iter().collect();
    rows.sort();
    rows
}

/// Compares table by table and reports only the first difference, because a log is long.
fn assert_same(read: &Models, folded: &Models) {
    for (name, read, folded) in [
        ("case_status", &read.case_status, &folded.case_status),
        ("journal", &read.journal, &folded.journal),
        ("workload", &read.workload, &folded.workload),
    ] {
        let differs = read.iter().zip(folded).find(|(read, folded)| read != folded);
        assert_eq!(differs, None, "{name}: the row read and the row expected");
        assert_eq!(read.len(), folded.len(), "the number of rows of {name}");
    }
}

/// A system with a release of two projectors and the first half of a log.
struct System {
    world: World,
    old: Folder,
    /// The lines that are appended later.
    second_half: Log,
    folded: Models,
    events: u64,
}

impl System {
    /// Creates the system and appends the first half of the log from a file. Boots nothing.
    async fn with_half_of(log: Log) -> Self {
        let world = World::new().await;
        let (first, second) = log.split_at(log.len() / 2);
        let files = Folder::new().with("first.jsonl", &first.join("\n"));
        let appended = world.run(&["append", &files.file("first.jsonl")]).await.exits(0);
        let appended = appended.stdout.replace(',', "");
        let count = first.len();
        assert_eq!(appended, format!("appended {count} events last position {count}\n"));
        System {
            world,
            old: Folder::new().with("1.toml", CASE_STATUS).with("2.toml", JOURNAL),
            second_half: second.to_vec(),
            folded: fold(&log),
            events: log.len() as u64,
        }
    }

    /// The next release, with a third projector.
    fn new_release(&self) -> Folder {
        Folder::new().with("1.toml", CASE_STATUS).with("2.toml", JOURNAL).with("3.toml", WORKLOAD)
    }

    /// The sum of the positions of these projectors. It grows with every batch.
    async fn progress(&self, projectors: &[&str]) -> u64 {
        let mut sum = 0;
        for name in projectors {
            sum += self.world.entry(name).await.map_or(0, |entry| entry.position.get());
        }
        sum
    }

    async fn eventually_at(&self, position: u64, projectors: &[&str]) {
        eventually(&format!("{projectors:?} at {position}"), async || {
            let mut reached = true;
            for name in projectors {
                reached &= self.world.position(name).await >= position;
            }
            reached
        })
        .await;
    }

    async fn assert_complete(&self) {
        let status = self.world.run(&["status", "--json"]).await.exits(0).json();
        assert_eq!(status["high_water"], self.world.last_position().await);
        for projector in status["projectors"].as_array().expect("a list") {
            assert_eq!(
                (projector["status"].as_str(), projector["lag_events"].as_u64()),
                (Some("live"), Some(0))
            );
        }
        assert_same(&read(&self.world).await, &self.folded);
    }
}

const OLD: [&str; 2] = ["case_status", "journal"];
const ALL: [&str; 3] = ["case_status", "journal", "workload"];

/// The options of a worker. An ended worker may have received messages that it did not delete. With
/// a short reconcile interval, the next worker reads their events from the store.
const WORKER: [&str; 4] = ["play", "--receive-wait=1", "--reconcile-after=1", "--projectors"];

/// Runs the whole story without faults.
async fn assert_models_equal_the_fold(log: Log) {
    let system = System::with_half_of(log).await;
    let world = &system.world;
    let first_half = world.last_position().await;
    let booted =
        world.run(&["boot", "--json", "--projectors", system.old.path()]).await.exits(0).json();
    assert_eq!(booted["released"], true);
    system.eventually_at(first_half, &OLD).await;

    let mut old_worker = start(world, &WORKER, &system.old);
    let mut writer = world.start_piped(&["append"]);
    let mut quarters = system.second_half.chunks(system.second_half.len().div_ceil(4));
    let mut next = || quarters.next().expect("four quarters");
    writer.write(next()).await;
    system.eventually_at(first_half + 1, &OLD).await;

    // The old worker plays on while events are appended.
    let new_release = system.new_release();
    writer.write(next()).await;
    let booted =
        world.run(&["boot", "--json", "--projectors", new_release.path()]).await.exits(0).json();
    assert_eq!(
        (&booted["released"], &booted["projectors"][2]["status"]),
        (&true.into(), &"live".into())
    );

    // The third projector never receives the messages that the old worker takes from the queue now.
    let third_position = world.position("workload").await;
    let quarter = next();
    writer.write(quarter).await;
    let written = system.events - (system.second_half.len() - 3 * quarter.len()) as u64;
    system.eventually_at(written, &OLD).await;
    assert!(old_worker.is_running());
    assert_eq!(
        world.position("workload").await,
        third_position,
        "an old worker must not play a projector that it does not know"
    );
    assert!(third_position < written, "the third projector misses some messages");

    old_worker.terminate().await.exits(0);
    let new_worker = start(world, &WORKER, &new_release);
    writer.write(next()).await;
    let count = system.second_half.len();
    let appended = writer.finish().await.exits(0);
    assert_eq!(
        appended.stdout,
        format!("appended {count} events, last position {}\n", system.events)
    );
    system.eventually_at(system.events, &ALL).await;
    new_worker.terminate().await.exits(0);
    system.assert_complete().await;
}

#[tokio::test]
async fn three_models_equal_the_fold_of_the_events() {
    let mut dice = fastrand::Rng::with_seed(seed());
    assert_models_equal_the_fold(log(1_600, &mut dice)).await;
}

/// Options for processes that are killed often: small batches, and a short visibility timeout.
const BOOT: [&str; 4] = ["boot", "--batch", "20", "--projectors"];
const PLAY: [&str; 8] = [
    "play",
    "--no-relay",
    "--visibility-timeout=3",
    "--receive-wait=1",
    "--reconcile-after=1",
    "--batch=20",
    "--grace-period=5",
    "--projectors",
];
const RELAY: [&str; 2] = ["relay", "--message-events=20"];

fn start(world: &World, command: &[&str], folder: &Folder) -> RunningProcess {
    world.start(&[command, &[folder.path()]].concat())
}

/// Waits a random time before a fault. The test does not wait for a condition here.
async fn random_pause(dice: &mut fastrand::Rng, most: u64) {
    tokio::time::sleep(Duration::from_millis(dice.u64(..most))).await;
}

/// Boots and kills the boot until it was killed `kills` times between two batches, then boots to
/// the end.
async fn boot_with_kills(
    system: &System,
    folder: &Folder,
    projectors: &[&str],
    kills: u32,
    dice: &mut fastrand::Rng,
) {
    let mut in_the_middle = 0;
    while in_the_middle < kills {
        let before = system.progress(projectors).await;
        let boot = RefCell::new(start(&system.world, &BOOT, folder));
        // One boot in four is killed at any time, also before its first batch.
        if dice.u8(..4) > 0 {
            eventually("boot moves a projector", async || {
                !boot.borrow_mut().is_running() || system.progress(projectors).await > before
            })
            .await;
        }
        random_pause(dice, 60).await;
        assert!(
            boot.into_inner().kill().await,
            "boot ended before it was killed {kills} times: append more events"
        );
        let mut is_booting = true;
        for name in projectors {
            is_booting &= system
                .world
                .entry(name)
                .await
                .is_some_and(|entry| entry.status.to_string() == "booting");
        }
        in_the_middle += u32::from(is_booting && system.progress(projectors).await > before);
    }
    start(&system.world, &BOOT, folder).finish().await.exits(0);
}

/// A worker and a relay that are killed and restarted while events are appended.
struct KilledProcesses<'a> {
    system: &'a System,
    folder: &'a Folder,
    play: RunningProcess,
    relay: RunningProcess,
}

impl<'a> KilledProcesses<'a> {
    fn start(system: &'a System, folder: &'a Folder) -> Self {
        let (play, relay) = (start(&system.world, &PLAY, folder), system.world.start(&RELAY));
        KilledProcesses { system, folder, play, relay }
    }

    /// Appends the pieces one by one. Kills the worker during each piece, and the relay during
    /// every third.
    async fn kill_repeatedly(
        &mut self,
        pieces: &[&[String]],
        writer: &mut PipedProcess,
        dice: &mut fastrand::Rng,
    ) {
        for (number, piece) in pieces.iter().enumerate() {
            let before = self.system.progress(&OLD).await;
            writer.write(piece).await;
            eventually("the worker moves a projector", async || {
                self.system.progress(&OLD).await > before
            })
            .await;
            random_pause(dice, 100).await;
            let play = start(&self.system.world, &PLAY, self.folder);
            assert!(std::mem::replace(&mut self.play, play).kill().await, "the worker was running");
            if number % 3 == 0 {
                let relay = self.system.world.start(&RELAY);
                assert!(
                    std::mem::replace(&mut self.relay, relay).kill().await,
                    "the relay was running"
                );
            }
        }
    }

    async fn stop(self) {
        // Before these log lines, SIGTERM ends a process without a clean shutdown.
        self.play.wait_for_log("playing").await;
        self.relay.wait_for_log("publishing").await;
        self.play.terminate().await.exits(0);
        self.relay.terminate().await.exits(0);
    }
}

/// Runs the whole story with SIGKILL of boot, play and relay.
async fn assert_models_survive_kills(log: Log, mut dice: fastrand::Rng) {
    let system = System::with_half_of(log).await;
    boot_with_kills(&system, &system.old, &OLD, 4, &mut dice).await;

    let mut killed = KilledProcesses::start(&system, &system.old);
    let mut writer = system.world.start_piped(&["append"]);
    let pieces: Vec<&[String]> =
        system.second_half.chunks(system.second_half.len().div_ceil(6)).collect();
    killed.kill_repeatedly(&pieces[..2], &mut writer, &mut dice).await;

    let new_release = system.new_release();
    let mut other_dice = dice.fork();
    tokio::join!(
        killed.kill_repeatedly(&pieces[2..4], &mut writer, &mut dice),
        boot_with_kills(&system, &new_release, &["workload"], 4, &mut other_dice),
    );
    assert_eq!(system.world.status("workload").await, "live");
    killed.stop().await;

    let mut killed = KilledProcesses::start(&system, &new_release);
    killed.kill_repeatedly(&pieces[4..], &mut writer, &mut dice).await;
    writer.finish().await.exits(0);
    system.eventually_at(system.world.last_position().await, &ALL).await;
    killed.stop().await;
    system.assert_complete().await;
}

#[tokio::test]
async fn events_survive_kills_of_boot_play_and_relay() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let log = log(3_000, &mut dice);
    assert_models_survive_kills(log, dice).await;
}
