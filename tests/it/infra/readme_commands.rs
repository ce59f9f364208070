//! Runs the commands of infra/README.md as they are written, one after the other.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use super::file;
use crate::support::{RunningProcess, World, is_mariadb};

/// The `sh` blocks of a section.
fn commands(section: &str) -> Vec<String> {
    let readme = fs::read_to_string(file("infra/README.md")).expect("the README");
    let (_, rest) = readme.split_once(&format!("\n## {section}\n")).expect("the section");
    let section = rest.split("\n## ").next().expect("the text of the section");
    let blocks = section.split("\n```sh\n").skip(1);
    blocks
        .map(|block| block.split_once("\n```").expect("the end of a block").0.to_owned())
        .collect()
}

#[tokio::test]
async fn the_readme_commands_lead_from_nothing_to_a_running_stack() {
    // The database server makes no difference here, and the AWS CLI is slow: one run is enough.
    if !is_mariadb().await {
        return;
    }
    let world = World::new().await;
    let blocks = commands("Try it against LocalStack");
    assert_eq!(blocks.len(), 5, "the section has five blocks");
    // A marker after each block separates the output of the blocks.
    let script: String = blocks
        .iter()
        .enumerate()
        .map(|(number, block)| format!("{block}\necho \"block {number} done\"\n"))
        .collect();
    // The environment that localstack/shell sets, with a database and stacks of this test only.
    let mut command = world.command(&[]);
    let binary = Path::new(command.as_std().get_program())
        .parent()
        .expect("the folder of the binary")
        .to_owned();
    let path = format!(
        "{}:{}:{}",
        file(".local/bin").display(),
        binary.display(),
        std::env::var("PATH").expect("a PATH")
    );
    let environment: Vec<_> = command
        .as_std()
        .get_envs()
        .map(|(name, value)| (name.to_owned(), value.map(ToOwned::to_owned)))
        .collect();
    command = tokio::process::Command::new("bash");
    command.args(["-euo", "pipefail", "-c", &script]).current_dir(file(""));
    for (name, value) in environment {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let service = world.database_name.replace('_', "-");
    command.env("PATH", path).env("SERVICE", &service).env_remove("QUEUE_URL");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let ended = RunningProcess::spawn(command).finish().await.exits(0);

    let output_of = |number: usize| -> &str {
        let (_, rest) = match number {
            0 => ("", ended.stdout.as_str()),
            _ => ended
                .stdout
                .split_once(&format!("block {} done\n", number - 1))
                .expect("the previous block has ended"),
        };
        rest.split_once(&format!("block {number} done\n")).expect("the block has ended").0
    };
    assert!(
        output_of(0).contains("PlayRole") && output_of(0).contains("CREATE_COMPLETE"),
        "{}",
        output_of(0)
    );
    assert!(
        output_of(1).contains("revenue@1") && output_of(1).contains("live"),
        "the projectors are booted: {}",
        output_of(1)
    );
    assert!(
        output_of(2).contains("idle: played 1 message"),
        "the worker plays from the queue of the stack: {}",
        output_of(2)
    );
    assert_eq!(world.number("select orders from revenue where country = 'NL'").await, 50);
    assert_eq!(world.number("select count(*) from order_status where status = 'paid'").await, 1);
    assert_eq!(world.position("order_status").await, world.last_position().await);
}
