//! Chaos on real parts: run it by `localstack/chaos`.
//!
//! Writers, workers of two releases, a relay and boots run as processes of their own, by way of
//! cables, while the faults of the design's catalogue strike: the seed says which, in what order.
//! Then all comes to rest, and each read model must be a fold of the log: lost and repeated
//! applications, zero. So must every moment in between be, as far as it can be seen.

mod auto_increment;
mod deploy;
mod faults;
mod figures;
mod fold;
mod parts;
mod process;
mod proxy;
mod queue_faults;
mod release;
mod report;
mod supervisor;
mod survivor;
mod watch;
mod writer;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use projectionist::sqlx;
use tokio::io::AsyncWriteExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, Semaphore};

use deploy::Deploys;
use faults::Targets;
use figures::Figures;
use parts::{DATABASE, Parts};
use process::{Kind, ProcessTable};
use proxy::Proxy;
use queue_faults::{QueueFaults, QueueKind};
use release::Release;
use report::Report;
use supervisor::Supervisor;
use watch::Watch;

/// All must be quiet by then: a straggler, a held message, a queue that LocalStack takes its time
/// to count.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

#[derive(Parser)]
struct Options {
    /// How long faults strike, in seconds; each must have struck at the end
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(60..=86_400))]
    seconds: u64,
    /// Chooses the faults; the moments are the machine's
    #[arg(long)]
    seed: Option<u64>,
    /// The kind of queue
    #[arg(long, value_enum, default_value_t = QueueKind::Fifo)]
    queue: QueueKind,
    /// Print the figures as one JSON object
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// One writer by plain SQL: started by a run of chaos
    #[command(hide = true)]
    Write { name: String, record: PathBuf },
}

/// On one thread, so that the dice of all tasks are of one seed.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    if let Some(Command::Write { name, record }) = &options.command {
        writer::write(name, record).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1_000_000_000));
    fastrand::seed(seed);
    let parts = Arc::new(Parts::from_environment()?);
    let folder = parts.state.join("run");
    let again = format!("--seed {seed} --queue {}", options.queue.as_str());
    eprintln!("{again}, {} s on {}; logs in {}", options.seconds, parts.server, folder.display());

    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let report = tokio::select! {
        report = run(parts, &folder, Duration::from_secs(options.seconds), options.queue, seed) => report,
        // The processes end with us.
        _ = terminate.recv() => return Ok(ExitCode::from(143)),
        _ = interrupt.recv() => return Ok(ExitCode::from(130)),
    };
    let report = report.with_context(|| {
        format!(
            "chaos came to no end: repeat it with {again}, and see the logs in {}",
            folder.display()
        )
    })?;
    match options.json {
        true => println!("{}", report.json()),
        false => println!("{report}"),
    }
    match report.is_ok() {
        true => Ok(ExitCode::SUCCESS),
        false => {
            eprintln!(
                "FAILED: repeat it with {again}; the logs of all processes are in {}",
                folder.display()
            );
            Ok(ExitCode::FAILURE)
        }
    }
}

async fn run(
    parts: Arc<Parts>,
    folder: &Path,
    duration: Duration,
    queue: QueueKind,
    seed: u64,
) -> anyhow::Result<Report> {
    let began = Instant::now();
    let [logs, records, releases] = ["logs", "records", "releases"].map(|name| folder.join(name));
    let _ = fs::remove_dir_all(folder);
    for folder in [&logs, &records, &releases] {
        fs::create_dir_all(folder)?;
    }
    let targets = set(parts, folder, queue, &records, releases).await?;
    let (parts, processes, figures) = (&targets.parts, &targets.processes, &targets.figures);
    let watching = tokio::spawn(Watch::default().keep(
        Arc::clone(parts),
        Arc::clone(processes),
        Arc::clone(figures),
    ));

    faults::strike(&targets, duration, &mut fastrand::Rng::with_seed(seed)).await;

    let mut supervisor = targets.supervisor.lock().await;
    supervisor.stop_all_but_survivor().await;
    survivor::silence_connections(&targets, &mut supervisor).await?;

    for cable in [&targets.database, &targets.writers, &targets.queue] {
        cable.mend();
    }
    supervisor.stop().await;
    let last = targets.deploys.lock().await.mend().await?;
    let taken = targets.queue_faults.collect().await?;
    if taken > 0 {
        figures.add_finding(format!(
            "{taken} messages that are not of the log were taken out of the queue by somebody"
        ));
    }
    play_until_idle(processes, &last).await?;
    let (audit, _) = processes.start(Kind::Audit, "audit-last", &["audit"])?;
    if audit.wait().await.code != Some(0) {
        figures.add_finding(format!("the last audit is not well: {}", audit.log.display()));
    }
    watching.abort();
    processes.judge_memory();
    auto_increment::check_refused(&targets, &last).await?;

    for cable in targets.databases() {
        let (before, after) = cable.commits_cut();
        figures.add("commits_cut_before", before);
        figures.add("commits_cut_after", after);
    }
    let connection = &mut parts.connect().await?;
    let count = async |connection: &mut _, sql| {
        sqlx::query_scalar::<_, i64>(sql).fetch_one(connection).await
    };
    figures.add(
        "events",
        count(connection, "select count(*) from events where event_type not like '$%'").await?
            as u64,
    );
    figures.add(
        "gap_fillers",
        count(connection, "select count(*) from events where event_type like '$%'").await? as u64,
    );
    fold::check_records(connection, &records, figures).await?;
    let starts = read_logs(&logs, figures)?;
    let mut verdicts = fold::compare(connection, &starts, &last.projectors()?).await?;
    let retired = &targets.deploys.lock().await.retired;
    verdicts.extend(fold::compare_retired(connection, &starts, retired, figures).await?);
    Ok(Report {
        seed,
        server: parts.server.clone(),
        version: parts.version().await?,
        queue: queue.as_str(),
        seconds: duration.as_secs(),
        took: began.elapsed(),
        memory_peaks: processes.memory_peaks(),
        verdicts,
        figures: Arc::clone(figures),
    })
}

/// A fresh database and queue, the first release booted, and everybody at work.
async fn set(
    parts: Arc<Parts>,
    folder: &Path,
    kind: QueueKind,
    records: &Path,
    releases: PathBuf,
) -> anyhow::Result<Arc<Targets>> {
    let figures = Arc::new(Figures::default());
    parts.make_database().await?;
    sqlx::raw_sql(include_str!("projectors/hostile.sql"))
        .execute(&mut parts.connect().await?)
        .await?;
    let queue_faults = QueueFaults::at(parts.queue_port()?, kind, &figures).await?;
    let (database, writers) =
        (Proxy::to(parts.server_port()?).await?, Proxy::to(parts.server_port()?).await?);
    let queue = Proxy::to(parts.queue_port()?).await?;
    // Not encrypted, so that the cable sees commits.
    let url = |cable: &Proxy| {
        format!("mysql://root@127.0.0.1:{}/{DATABASE}?ssl-mode=DISABLED", cable.port)
    };
    let environment = vec![
        // By this `localstack/chaos` knows what it may kill.
        ("PROJECTIONIST_CHAOS", parts.state.display().to_string()),
        ("DATABASE_URL", url(&database)),
        ("QUEUE_URL", queue_faults.queue_url.clone()),
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", queue.port)),
        // The shortest that there is: a pause, or a stall, and it has expired.
        ("PROJECTIONIST_VISIBILITY_TIMEOUT", "3".into()),
        ("PROJECTIONIST_CONNECT_TIMEOUT", "5".into()),
        ("PROJECTIONIST_BATCH", "200".into()),
        ("PROJECTIONIST_LOG_FORMAT", "json".into()),
    ];
    let processes =
        Arc::new(ProcessTable::new(folder.to_owned(), environment, url(&writers), &figures)?);
    let first = Release::first(&releases)?;
    for arguments in [
        &["migrate"][..],
        &["append"],
        &["boot", "--projectors", first.path(), "--release", &first.name],
    ] {
        let kind = if arguments[0] == "append" { Kind::Append } else { Kind::Boot };
        let (process, stdin) = processes.start(kind, arguments[0], arguments)?;
        if let Some(mut stdin) = stdin {
            stdin.write_all(writer::history().as_bytes()).await?;
        }
        ensure!(
            process.wait().await.code == Some(0),
            "{} failed: {}",
            arguments[0],
            process.log.display()
        );
    }
    let supervisor = Supervisor::start(&processes, records, &first, &figures)?;
    let deploys = Deploys::new(&processes, &parts, &figures, releases, &first);
    Ok(Arc::new(Targets {
        parts,
        database,
        writers,
        queue,
        processes,
        queue_faults,
        figures,
        supervisor: Mutex::new(supervisor),
        deploys: Mutex::new(deploys),
        deploying: Semaphore::new(6),
        server: Mutex::new(()),
    }))
}

async fn play_until_idle(processes: &Arc<ProcessTable>, release: &Release) -> anyhow::Result<()> {
    let arguments =
        ["play", "--until-idle", "--projectors", release.path(), "--release", &release.name];
    // Judged here: it may end by itself.
    let (process, _) = processes.start(Kind::Boot, "play-until-idle", &arguments)?;
    let ended = tokio::time::timeout(IDLE_TIMEOUT, process.wait()).await;
    let ended =
        ended.with_context(|| format!("play does not become idle: {}", process.log.display()))?;
    ensure!(
        ended.code == Some(0),
        "play --until-idle ended with {:?}: {}",
        ended.code,
        process.log.display()
    );
    Ok(())
}

/// Counts what broke, and finds what no log may have. Returns where each projector stood when a
/// boot first took it up: a start that the ledger has forgotten.
fn read_logs(logs: &Path, figures: &Figures) -> anyhow::Result<HashMap<String, u64>> {
    let mut starts: HashMap<String, u64> = HashMap::new();
    for log in fs::read_dir(logs)? {
        let path = log?.path();
        let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        if text.contains("panicked at") {
            figures.add_finding(format!("a panic: {}", path.display()));
        }
        for line in
            text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        {
            match line["alert"].as_str() {
                Some("projector_broken") => figures.add("projectors_broken", 1),
                Some("log_fault") => {
                    figures.add_finding(format!("a fault in the log: {}", path.display()))
                }
                _ => {}
            }
            if line["message"] == "changed since it was booted" {
                figures.add("definitions_changed", 1);
            }
            let booted =
                (line["message"].as_str(), line["projector"].as_str(), line["position"].as_u64());
            if let (Some("booting"), Some(id), Some(position)) = booted {
                let name = id.split('@').next().unwrap_or(id).to_owned();
                let start = starts.entry(name).or_insert(position);
                *start = position.min(*start);
            }
        }
    }
    Ok(starts)
}
