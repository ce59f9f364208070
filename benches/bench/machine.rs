//! The machine and the servers of a run. Servers that are not up are started by `localstack/up`.

use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

/// At a load above this, other processes influence the figures.
const MAX_LOAD: f64 = 0.7;

/// The addresses of a database server and of LocalStack.
pub struct Parts {
    /// `mysql://USER@HOST:PORT`, with a user who may create databases.
    pub server_url: String,
    pub sqs_endpoint: String,
}

impl Parts {
    /// Takes the addresses from the environment, or starts the servers with `localstack/up`.
    pub fn locate(server: &str) -> anyhow::Result<Self> {
        let url = format!("{}_URL", server.to_uppercase());
        let from_environment = |name: &str| std::env::var(name).ok();
        if let (Some(server_url), Some(sqs_endpoint)) =
            (from_environment(&url), from_environment("AWS_ENDPOINT_URL"))
        {
            return Ok(Parts { server_url, sqs_endpoint });
        }
        let up = concat!(env!("CARGO_MANIFEST_DIR"), "/localstack/up");
        let ended = Command::new(up).args([server, "sqs"]).output().context(up)?;
        ensure!(ended.status.success(), "{up} failed: {}", String::from_utf8_lossy(&ended.stderr));
        Ok(Parts { server_url: read_state(&url)?, sqs_endpoint: read_state("AWS_ENDPOINT_URL")? })
    }
}

/// Reads a variable from the file that `localstack/up` writes.
fn read_state(name: &str) -> anyhow::Result<String> {
    let state = std::env::var("PROJECTIONIST_STATE")
        .unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/.local").into());
    let text =
        std::fs::read_to_string(format!("{state}/env")).with_context(|| format!("{state}/env"))?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix("export ")?.strip_prefix(name)?.strip_prefix('='));
    Ok(value
        .with_context(|| format!("{name} is not in {state}/env"))?
        .trim_matches(['\'', '"'])
        .to_owned())
}

/// The load average of the last minute.
pub fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or_default()
}

/// Collects the facts that a reader of the figures needs, and prints them. Warns if the build is
/// not optimised or the machine is busy.
pub fn facts(server: &str, version: &str, settings: &[(String, String)]) -> Value {
    let (cpus, load) = (std::thread::available_parallelism().map_or(0, usize::from), load());
    let profile = if cfg!(debug_assertions) { "not optimised" } else { "bench" };
    if cfg!(debug_assertions) {
        eprintln!("WARNING: not an optimised build: the figures mean nothing");
    }
    if load > MAX_LOAD {
        eprintln!("WARNING: load {load}: other processes influence these figures");
    }
    let settings: serde_json::Map<String, Value> =
        settings.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    let facts = json!({
        "server": server,
        "version": version,
        "settings": settings,
        "cpus": cpus,
        "load_at_start": load,
        "profile": profile,
        "at": time::OffsetDateTime::now_utc().unix_timestamp(),
    });
    eprintln!("{}", describe(&facts));
    facts
}

/// The facts as a line of text.
pub fn describe(facts: &Value) -> String {
    let settings = facts["settings"].as_object().into_iter().flatten();
    let settings: Vec<String> = settings
        .map(|(name, value)| format!("{name}={}", value.as_str().unwrap_or_default()))
        .collect();
    let text = |name: &str| facts[name].as_str().unwrap_or_default().to_owned();
    format!(
        "{} {}, {} CPUs, load {}, profile {}; {}",
        text("server"),
        text("version"),
        facts["cpus"],
        facts["load_at_start"],
        text("profile"),
        settings.join(", ")
    )
}
