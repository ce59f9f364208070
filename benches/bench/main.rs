//! `cargo bench`: each row measures ours and the bare loop that bounds it, in turn, on local
//! servers.
//!
//! The bench starts missing servers with `localstack/up`, makes a database and queues of its own,
//! and removes them at the end. It does not fail on a missed target; the table shows which targets
//! are met. `cargo test --bench bench -- --quick` checks in minutes that every row works.

mod bare;
mod boot;
mod cores;
mod endpoint;
mod fence;
mod flat;
mod growth;
mod hand_written;
mod idle;
mod lanes;
mod latency;
mod log;
mod machine;
mod many;
mod mark;
mod play;
mod projectors;
mod queue_probes;
mod sheet;
mod stub;
mod world;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use endpoint::Endpoint;
use log::Sample;
use machine::Parts;
use projectionist::Registry;
use projectors::Nothing;
use sheet::Sheet;

#[derive(Parser)]
#[command(max_term_width = 110)]
struct Options {
    #[arg(long, value_enum, default_value = "mariadb")]
    server: Server,
    /// Events in the log of rows 1 to 5 and 11; a third of them in rows with a statement for every
    /// event
    #[arg(long, default_value_t = 300_000, value_parser = clap::value_parser!(u64).range(1_000..))]
    events: u64,
    /// Rounds of each measurement
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Measure only these rows; all by default
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = 1..=14,
        value_parser = clap::value_parser!(u32).range(1..=14)
    )]
    rows: Vec<u32>,
    /// The lengths of the log in row 9, ascending
    #[arg(long, value_delimiter = ',', default_values_t = [100_000, 1_000_000, 5_000_000])]
    sizes: Vec<u64>,
    /// A file of events, one a line as for `projectionist append`, from which the log is made;
    /// generated events by default
    #[arg(long)]
    sample: Option<PathBuf>,
    /// Write every round to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Only check that every row works: few events, one round
    #[arg(long)]
    quick: bool,
    /// Cargo passes this flag to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Server {
    Mariadb,
    Mysql,
}

/// If this variable is set, the program is a worker of row 9.
const WORKER: &str = "PROJECTIONIST_BENCH_WORKER";

/// What every row uses.
struct Bench {
    options: Options,
    parts: Parts,
    sample: Sample,
    stub: SocketAddr,
}

/// How much is measured in the rows with a queue or a fixed duration.
struct Sizes {
    /// Messages with one event each, by endpoint.
    localstack_messages: u64,
    stub_messages: u64,
    /// Messages with one event each, in the rows in which the relay sends them one after the other.
    relayed_messages: u64,
    /// Events in packed messages.
    packed_events: u64,
    latency_seconds: u64,
    mark_duration: Duration,
}

const WHOLE: Sizes = Sizes {
    localstack_messages: 3_000,
    stub_messages: 20_000,
    relayed_messages: 1_000,
    packed_events: 100_000,
    latency_seconds: 10,
    mark_duration: Duration::from_secs(5),
};

const QUICK: Sizes = Sizes {
    localstack_messages: 100,
    stub_messages: 500,
    relayed_messages: 50,
    packed_events: 3_000,
    latency_seconds: 1,
    mark_duration: Duration::from_millis(500),
};

impl Server {
    fn as_str(self) -> &'static str {
        match self {
            Server::Mariadb => "mariadb",
            Server::Mysql => "mysql",
        }
    }
}

impl Options {
    fn read() -> Self {
        let options = Options::parse();
        if options.quick {
            Options { events: 6_000, rounds: 1, sizes: vec![2_000, 4_000], ..options }
        } else {
            options
        }
    }

    /// The number of events in rows with a statement for every event.
    fn fewer_events(&self) -> u64 {
        self.events / 3
    }
}

impl Bench {
    fn sizes(&self) -> &'static Sizes {
        if self.options.quick { &QUICK } else { &WHOLE }
    }

    async fn localstack(&self) -> Endpoint {
        Endpoint::new("LocalStack", &self.parts.sqs_endpoint).await
    }

    async fn stub(&self) -> anyhow::Result<Endpoint> {
        Ok(Endpoint::new("stub", &format!("http://{}", self.stub)).await)
    }
}

fn main() -> anyhow::Result<ExitCode> {
    if std::env::var_os(WORKER).is_some() {
        return Ok(projectionist::run(Registry::new().with(Nothing::with_all())?));
    }
    // The runtime of the released binary.
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(bench())
}

async fn bench() -> anyhow::Result<ExitCode> {
    let options = Options::read();
    let server = options.server.as_str();
    let parts = Parts::locate(server)?;
    let sample = options.sample.as_deref().map_or_else(|| Ok(Sample::generated()), Sample::read)?;
    let (version, settings) = world::describe_server(&parts).await?;
    let mut sheet = Sheet::new(machine::facts(server, &version, &settings));
    let bench = Bench { options, parts, sample, stub: stub::start()? };

    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let ended = tokio::select! {
        ended = run(&bench, &mut sheet) => ended.map(|()| ExitCode::SUCCESS),
        _ = terminate.recv() => Ok(ExitCode::from(143)),
        _ = interrupt.recv() => Ok(ExitCode::from(130)),
    };
    // After an error or a signal, the finished lines are printed, too.
    println!("\n{sheet}");
    if let Some(file) = &bench.options.json {
        std::fs::write(file, format!("{:#}\n", sheet.json()))
            .with_context(|| file.display().to_string())?;
    }
    world::clear(&bench.parts).await?;
    bench.localstack().await.clear().await?;
    ended
}

async fn run(bench: &Bench, sheet: &mut Sheet) -> anyhow::Result<()> {
    for row in &bench.options.rows {
        eprintln!("row {row}");
        let measured = match row {
            1 => boot::nothing(bench, sheet).await,
            2 => boot::upsert_each(bench, sheet).await,
            3 => boot::upsert_rows(bench, sheet).await,
            4 => boot::eight_at_once(bench, sheet).await,
            5 => boot::one_in_a_hundred(bench, sheet).await,
            6 => play::one_event_per_message(bench, sheet).await,
            7 => play::packed(bench, sheet).await,
            8 => latency::delays(bench, sheet).await,
            9 => growth::growth(bench, sheet).await,
            10 => mark::high_water(bench, sheet).await,
            11 => cores::computing(bench, sheet).await,
            12 => many::one_type_each(bench, sheet).await,
            13 => idle::worker(bench, sheet).await,
            _ => flat::flat(bench, sheet).await,
        };
        measured.with_context(|| format!("row {row}"))?;
    }
    Ok(())
}
