//! The start of a function, and the invocations that it refuses.

use std::process::Stdio;
use std::time::Instant;

use serde_json::json;

use crate::support::{Folder, Function, RunningProcess, Runtime, TIMEOUT, Tally, World, schedule};

#[tokio::test]
async fn an_unknown_invocation_is_refused_and_the_function_continues() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.boot_files(&[&a.file(&[])]).await;
    let mut command = world.command(&["lambda", "--projectors", folder.path()]);
    command.env_remove("QUEUE_URL");
    let mut function = Function::start(command).await;
    for (event, word) in [
        (json!("{\"Records\":"), "EOF"),
        (json!({"Records": [{"eventSource": "aws:s3", "s3": {}}]}), "aws:s3"),
        (json!({"key": "value"}), "neither Records nor a detail-type"),
        (schedule(), "QUEUE_URL"),
    ] {
        let error = function.invoke(&event, TIMEOUT).await.expect_err("the invocation is refused");
        assert_eq!(error["errorType"], "Projectionist.Input");
        let message = error["errorMessage"].as_str().expect("a message");
        assert!(message.contains(word), "{message}");
    }
    // A batch does not need QUEUE_URL.
    world.append_and_publish(20).await;
    assert_eq!(function.drain(&world).await, 2);
    world.assert_complete(&a).await;
}

#[tokio::test]
async fn a_failed_initialization_is_reported_to_lambda_with_the_usual_exit_code() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &Tally::new("a").file(&[]));
    let with_projectors = ["lambda", "--projectors", folder.path()];
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent = format!("mysql://root@{}/x", silent.local_addr().expect("an address"));
    for (arguments, url, kind, code, words) in [
        (
            &["lambda"][..],
            Some(world.database_url.as_str()),
            "Projectionist.Input",
            2,
            &["no projectors", "PROJECTORS"][..],
        ),
        (
            &with_projectors,
            None,
            "Projectionist.Input",
            2,
            &["no database is named", "DATABASE_URL"],
        ),
        (
            &with_projectors,
            Some("mysql://root@127.0.0.1:1/x"),
            "Projectionist.Unreachable",
            3,
            &["127.0.0.1:1/x"],
        ),
        (&with_projectors, Some(&silent), "Projectionist.Unreachable", 3, &["did not answer"]),
    ] {
        let mut runtime = Runtime::new().await;
        let mut command = world.command(arguments);
        match url {
            Some(url) => command.env("DATABASE_URL", url),
            None => command.env_remove("DATABASE_URL"),
        };
        runtime.configure(&mut command);
        let ended = RunningProcess::spawn(command).finish().await.exits(code).prints(words);
        let error = runtime.init_error().await;
        assert_eq!(
            (&error["errorType"], error["errorMessage"].as_str()),
            (&json!(kind), Some(ended.error().as_str()))
        );
    }
    let elsewhere = world.run(&with_projectors).await.exits(2);
    elsewhere.prints(&["AWS_LAMBDA_RUNTIME_API is not set", "use play elsewhere"]);
}

#[tokio::test]
async fn the_binary_without_arguments_is_a_function_inside_lambda() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.boot_files(&[&a.file(&[])]).await;
    let mut bootstrap = world.command(&[]);
    bootstrap.env("PROJECTORS", folder.path());
    let mut function = Function::start(bootstrap).await;
    world.append_and_publish(10).await;
    assert_eq!(function.drain(&world).await, 1);
    world.assert_complete(&a).await;
}

/// A measurement: prints the time from the start of a function to its first request to the runtime,
/// and to its first response, when the first projection is committed. `PROJECTIONIST_BINARY` names
/// a binary other than the one of the tests.
#[tokio::test]
#[ignore = "measures, and asserts nothing"]
async fn cold_start() {
    let world = World::new().await;
    let a = Tally::new("a");
    let folder = world.boot_files(&[&a.file(&[])]).await;
    let (mut to_init, mut to_commit) = (Vec::new(), Vec::new());
    for _ in 0..15 {
        world.append_and_publish(10).await;
        let batch = world.capture().await;
        let command = world.command(&["lambda", "--projectors", folder.path()]);
        let command = match std::env::var("PROJECTIONIST_BINARY") {
            Ok(binary) => {
                let mut other = tokio::process::Command::new(binary);
                other
                    .args(command.as_std().get_args())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                command
                    .as_std()
                    .get_envs()
                    .for_each(|(name, value)| _ = value.map(|value| other.env(name, value)));
                other
            }
            Err(_) => command,
        };
        let began = Instant::now();
        let mut function = Function::start(command).await;
        to_init.push(began.elapsed());
        let answer = function.invoke(&batch.event(&world), TIMEOUT).await.expect("an answer");
        to_commit.push(began.elapsed());
        assert_eq!(batch.settle(&world, &answer).await, Vec::<usize>::new());
    }
    world.assert_complete(&a).await;
    for (what, mut times) in
        [("init done", to_init), ("first batch of ten events committed", to_commit)]
    {
        times.sort();
        eprintln!(
            "{what}: median {:?}, from {:?} to {:?}",
            times[times.len() / 2],
            times[0],
            times[times.len() - 1]
        );
    }
}
