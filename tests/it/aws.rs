//! The environment's settings for AWS calls are used, and a long poll does not time out.

use std::time::Duration;

use crate::support::{Folder, RunningProcess, SqsStub, World, eventually};

#[tokio::test]
async fn the_environment_sets_how_often_a_call_is_attempted() {
    let world = World::new().await;
    let stub = SqsStub::new().await;
    stub.set_response(
        "GetQueueAttributes",
        500,
        r#"{"__type":"com.amazonaws.sqs#InternalError","message":"not now"}"#,
    );
    for (attempts, before) in [("1", 0), ("2", 1)] {
        let mut relay = world.command(&["relay", "--once"]);
        relay
            .env("AWS_ENDPOINT_URL", stub.endpoint())
            .env("QUEUE_URL", format!("{}/0/q.fifo", stub.endpoint()));
        relay.env("AWS_MAX_ATTEMPTS", attempts);
        RunningProcess::spawn(relay).finish().await.exits(3);
        assert_eq!(
            stub.call_count("GetQueueAttributes") - before,
            attempts.parse::<usize>().expect("the value is a number")
        );
    }
}

#[tokio::test]
async fn invalid_aws_settings_are_reported() {
    let world = World::new().await;
    for (name, value) in [("AWS_MAX_ATTEMPTS", "0"), ("AWS_RETRY_MODE", "eager")] {
        let mut relay = world.command(&["relay", "--once"]);
        relay.env(name, value);
        RunningProcess::spawn(relay).finish().await.exits(2).prints(&[name]);
    }
}

const COUNTER: &str = "name = 'counter'\nversion = 1\nmode = 'from_beginning'\n\
    setup = ['create table if not exists counter (n bigint)']\n\n\
    [[on]]\nevents = ['*']\nsql = 'insert into counter (n) values (:position)'\n";

#[tokio::test]
async fn a_twenty_second_poll_does_not_time_out() {
    let world = World::new().await;
    let stub = SqsStub::new().await;
    stub.set_response("ReceiveMessage", 200, "{}");
    stub.set_delay("ReceiveMessage", Duration::from_secs(20));
    let folder = Folder::new().with("1.toml", COUNTER);
    let mut play = world.command(&["play", "--receive-wait=20", "--projectors", folder.path()]);
    play.env("AWS_ENDPOINT_URL", stub.endpoint())
        .env("QUEUE_URL", format!("{}/0/q.fifo", stub.endpoint()));
    play.env("AWS_MAX_ATTEMPTS", "1");
    let play = RunningProcess::spawn(play);
    eventually("the second poll is under way", async || stub.call_count("ReceiveMessage") == 2)
        .await;
    let played = play.terminate().await.exits(0);
    assert!(!played.stderr.contains("cannot receive"), "{}", played.stderr);
}
