//! A server with `auto_increment_increment = 2`: every command must refuse it and name the setting.
//! This runs last, because the setting is global. The server belongs to this run.

use std::sync::Arc;
use std::time::Duration;

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};

use crate::faults::Targets;
use crate::process::{Kind, ProcessTable};
use crate::release::Release;

/// The limit for a command to end.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Checks that each command refuses such a server, and works after the setting has been reset.
pub async fn check_refused(targets: &Targets, release: &Release) -> anyhow::Result<()> {
    let connection = &mut targets.parts.connect().await?;
    let set = ["--projectors", release.path(), "--release", &release.name];
    set_increment(2, connection).await?;
    for (command, options) in
        [("boot", &set[..]), ("play", &set), ("relay", &[]), ("append", &[]), ("status", &set)]
    {
        let (code, log) = run(&targets.processes, command, options).await?;
        if code == Some(2) && log.contains("auto_increment_increment = 2") {
            targets.figures.add("refused_by_increment", 1);
        } else {
            targets.figures.add_finding(format!(
                "{command} does not refuse auto_increment_increment = 2: {code:?} {log}"
            ));
        }
    }
    set_increment(1, connection).await?;
    let (code, log) = run(&targets.processes, "status", &set).await?;
    if code != Some(0) {
        targets
            .figures
            .add_finding(format!("status ends with {code:?} after the setting is 1 again: {log}"));
    }
    Ok(())
}

async fn set_increment(increment: u8, connection: &mut MySqlConnection) -> anyhow::Result<()> {
    let set = format!("set global auto_increment_increment = {increment}");
    sqlx::raw_sql(AssertSqlSafe(set)).execute(connection).await?;
    Ok(())
}

/// Runs a command. Returns its exit code and its log; `None` if it had to be killed.
async fn run(
    processes: &Arc<ProcessTable>,
    command: &str,
    options: &[&str],
) -> anyhow::Result<(Option<i32>, String)> {
    let arguments = [&[command], options].concat();
    let (process, _) =
        processes.start(Kind::Refused, &format!("stepping-{command}"), &arguments)?;
    let ended = match tokio::time::timeout(END_TIMEOUT, process.wait()).await {
        Ok(ended) => ended,
        Err(_) => {
            process.signal("KILL");
            process.wait().await
        }
    };
    Ok((ended.code, std::fs::read_to_string(&process.log)?))
}
