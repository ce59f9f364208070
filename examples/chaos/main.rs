//! Chaos on real servers. Run it with `localstack/chaos`.
//!
//! Writers, workers of two releases, a relay and boots run as separate processes and connect
//! through proxies. Meanwhile, the faults of [`faults`] strike. The seed decides which faults
//! strike, and in which order. After the faults, everything becomes idle, and each read model must
//! equal a fold of the log: no event lost, none applied twice. [`watch`] checks the same during the
//! run, as far as it can be observed.

mod auto_increment;
mod deck;
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

/// The limit for the last play to become idle. It has to wait for projectors far behind, for hidden
/// messages, and for LocalStack, which counts its messages with a delay.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

#[derive(Parser)]
struct Options {
    /// How long faults strike, in seconds; every kind must have happened by then
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(60..=86_400))]
    seconds: u64,
    /// Seed of the choice of faults; their exact moments depend on the machine
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
    /// One writer in plain SQL, started by a chaos run
    #[command(hide = true)]
    Write { name: String, record: PathBuf },
}

/// One thread, so that all tasks take their random numbers from one seed.
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
    let options_to_repeat = format!("--seed {seed} --queue {}", options.queue.as_str());
    eprintln!(
        "{options_to_repeat}, {} s on {}; logs in {}",
        options.seconds,
        parts.server,
        folder.display()
    );

    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let duration = Duration::from_secs(options.seconds);
    let report = tokio::select! {
        report = run(parts, &folder, duration, options.queue, seed) => report,
        // The other processes end with this one.
        _ = terminate.recv() => return Ok(ExitCode::from(143)),
        _ = interrupt.recv() => return Ok(ExitCode::from(130)),
    };
    let report = report.with_context(|| {
        format!(
            "chaos did not finish: repeat it with {options_to_repeat}, and see the logs in {}",
            folder.display()
        )
    })?;
    if options.json {
        println!("{}", report.json());
    } else {
        println!("{report}");
    }
    if report.is_ok() {
        Ok(ExitCode::SUCCESS)
    } else {
        eprintln!(
            "FAILED: repeat it with {options_to_repeat}; the logs of all processes are in {}",
            folder.display()
        );
        Ok(ExitCode::FAILURE)
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
    let targets = set_up(parts, folder, queue, &records, releases).await?;
    let (parts, processes, figures) = (&targets.parts, &targets.processes, &targets.figures);
    let watching = tokio::spawn(Watch::default().run(
        Arc::clone(parts),
        Arc::clone(processes),
        Arc::clone(figures),
    ));

    let reviving = tokio::spawn(faults::revive_server(Arc::clone(&targets)));

    faults::strike(&targets, duration, &mut fastrand::Rng::with_seed(seed)).await;

    let mut supervisor = targets.supervisor.lock().await;
    supervisor.stop_all_but_survivor().await;
    survivor::silence_connections(&targets, &mut supervisor).await?;

    for proxy in [&targets.database, &targets.writers, &targets.queue] {
        proxy.end_faults();
    }
    supervisor.stop().await;
    let last = targets.deploys.lock().await.boot_fixed().await?;
    let taken = targets.queue_faults.collect().await?;
    if taken > 0 {
        figures.add_finding(format!(
            "another process deleted {taken} messages that are not of the log"
        ));
    }
    play_until_idle(processes, &last).await?;
    let (audit, _) = processes.start(Kind::Audit, "audit-last", &["audit"])?;
    if audit.wait().await.code != Some(0) {
        figures.add_finding(format!("the last audit failed: {}", audit.log.display()));
    }
    watching.abort();
    processes.check_memory();
    auto_increment::check_refused(&targets, &last).await?;

    for proxy in targets.database_proxies() {
        let (before, after) = proxy.commits_cut();
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
    reviving.abort();
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

/// Creates the database and the queue, boots the first release, and starts all processes.
async fn set_up(
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
    // Not encrypted, so that the proxy can recognise commits.
    let url = |proxy: &Proxy| {
        format!("mysql://root@127.0.0.1:{}/{DATABASE}?ssl-mode=DISABLED", proxy.port)
    };
    let environment = vec![
        // Marks the processes that `localstack/chaos` may kill.
        ("PROJECTIONIST_CHAOS", parts.state.display().to_string()),
        ("DATABASE_URL", url(&database)),
        ("QUEUE_URL", queue_faults.queue_url.clone()),
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", queue.port)),
        // The shortest allowed timeout: it expires during a pause or a stall.
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
    // Its end is checked here, because it may end by itself.
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

/// Counts the log lines that have a figure, and adds a finding for each panic and each log fault.
/// Returns the position of each projector when a boot first booted it. The ledger does not store
/// this start.
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
