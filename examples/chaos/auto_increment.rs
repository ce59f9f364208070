//! A server that is told to step over positions: nobody works on it, and everybody says why. Only
//! here, at the end of it all: the setting is the whole server's, and this one is our own.

use std::sync::Arc;
use std::time::Duration;

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};

use crate::faults::Targets;
use crate::process::{Kind, ProcessTable};
use crate::release::Release;

const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Shows that each command refuses the server while it is set up so, and works when it is set back.
pub async fn check_refused(targets: &Targets, release: &Release) -> anyhow::Result<()> {
    let connection = &mut targets.parts.connect().await?;
    let set = ["--projectors", release.path(), "--release", &release.name];
    set_increment(2, connection).await?;
    for (command, options) in
        [("boot", &set[..]), ("play", &set), ("relay", &[]), ("append", &[]), ("status", &set)]
    {
        let (code, log) = run(&targets.processes, command, options).await?;
        match code == Some(2) && log.contains("auto_increment_increment = 2") {
            true => targets.figures.add("refused_by_increment", 1),
            false => targets.figures.add_finding(format!(
                "{command} does not refuse auto_increment_increment = 2: {code:?} {log}"
            )),
        }
    }
    set_increment(1, connection).await?;
    let (code, log) = run(&targets.processes, "status", &set).await?;
    if code != Some(0) {
        targets
            .figures
            .add_finding(format!("status ends with {code:?} where the setting is 1 again: {log}"));
    }
    Ok(())
}

async fn set_increment(increment: u8, connection: &mut MySqlConnection) -> anyhow::Result<()> {
    let set = format!("set global auto_increment_increment = {increment}");
    sqlx::raw_sql(AssertSqlSafe(set)).execute(connection).await?;
    Ok(())
}

/// Runs a command to its end. `None`: it was killed, for it came to none.
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
