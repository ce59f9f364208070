//! LocalStack behind the stand-in: its CloudFormation and its logs, asked by the real AWS CLI.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::process::Command;

use super::fake_aws::{CliOutput, option};

/// Its CloudFormation does not keep templates for `--use-previous-template`.
pub fn with_template(arguments: &[String], template: &Path) -> Vec<String> {
    let body = format!("--template-body=file://{}", template.display());
    arguments
        .iter()
        .map(
            |argument| {
                if argument == "--use-previous-template" { body.clone() } else { argument.clone() }
            },
        )
        .collect()
}

/// Asks the real CLI.
pub async fn forward(cli: &Path, arguments: &[String]) -> CliOutput {
    let output = Command::new(cli).args(arguments).output().await.expect("the CLI runs");
    let text = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

/// What the log driver does: makes the stream, and puts the new lines into it.
pub async fn ship_logs(cli: &Path, arguments: &[String], lines: &[String], is_first: bool) {
    let (group, stream) =
        (option(arguments, "--log-group-name"), option(arguments, "--log-stream-name"));
    let call = async |operation: &str, more: &[String]| {
        let names = ["logs", operation, "--log-group-name", group, "--log-stream-name", stream];
        let arguments: Vec<String> =
            names.iter().map(|word| word.to_string()).chain(more.iter().cloned()).collect();
        let (code, text) = forward(cli, &arguments).await;
        assert_eq!(code, 0, "{text}");
    };
    if is_first {
        call("create-log-stream", &[]).await;
    }
    if !lines.is_empty() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let events: Value = lines
            .iter()
            .map(|line| json!({"timestamp": now.as_millis() as u64, "message": line}))
            .collect();
        call("put-log-events", &["--log-events".into(), events.to_string()]).await;
    }
}
