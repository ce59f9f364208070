//! LocalStack behind the fake AWS: calls its CloudFormation and its logs with the real AWS CLI.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::process::Command;

use super::fake_aws::{CliOutput, option};

/// Replaces `--use-previous-template` with the template, because LocalStack does not keep it.
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

/// Runs the real AWS CLI.
pub async fn forward(cli: &Path, arguments: &[String]) -> CliOutput {
    let output = Command::new(cli).args(arguments).output().await.expect("the AWS CLI starts");
    let text = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

/// Does the work of the ECS log driver: creates the stream, and writes the new lines to the stream.
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
