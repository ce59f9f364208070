//! Calls of AWS are made as the environment says, and a poll may take its time.

use std::time::Duration;

use crate::support::{Folder, Running, Stub, World, eventually};

#[tokio::test]
async fn the_environment_says_how_often_a_call_is_tried() {
    let world = World::new().await;
    let stub = Stub::new().await;
    stub.answers("GetQueueAttributes", 500, r#"{"__type":"com.amazonaws.sqs#InternalError","message":"not now"}"#);
    for (attempts, before) in [("1", 0), ("2", 1)] {
        let mut relay = world.command(&["relay", "--once"]);
        relay.env("AWS_ENDPOINT_URL", stub.endpoint()).env("QUEUE_URL", format!("{}/0/q.fifo", stub.endpoint()));
        relay.env("AWS_MAX_ATTEMPTS", attempts);
        Running::spawn(relay).finish().await.exits(3);
        assert_eq!(stub.asked("GetQueueAttributes") - before, attempts.parse::<usize>().expect("a number"));
    }
}

#[tokio::test]
async fn settings_of_aws_that_cannot_be_read_are_told() {
    let world = World::new().await;
    for (name, value) in [("AWS_MAX_ATTEMPTS", "0"), ("AWS_RETRY_MODE", "eager")] {
        let mut relay = world.command(&["relay", "--once"]);
        relay.env(name, value);
        Running::spawn(relay).finish().await.exits(2).says(&[name]);
    }
}

const COUNTER: &str = "name = 'counter'\nversion = 1\nmode = 'from_beginning'\n\
    setup = ['create table if not exists counter (n bigint)']\n\n\
    [[on]]\nevents = ['*']\nsql = 'insert into counter (n) values (:position)'\n";

#[tokio::test]
async fn a_poll_of_twenty_seconds_is_not_cut_off() {
    let world = World::new().await;
    let stub = Stub::new().await;
    stub.answers("ReceiveMessage", 200, "{}");
    stub.takes("ReceiveMessage", Duration::from_secs(20));
    let folder = Folder::new().with("1.toml", COUNTER);
    let mut play = world.command(&["play", "--receive-wait=20", "--projectors", folder.path()]);
    play.env("AWS_ENDPOINT_URL", stub.endpoint()).env("QUEUE_URL", format!("{}/0/q.fifo", stub.endpoint()));
    play.env("AWS_MAX_ATTEMPTS", "1");
    let play = Running::spawn(play);
    eventually("the second poll is under way", async || stub.asked("ReceiveMessage") == 2).await;
    let played = play.terminate().await.exits(0);
    assert!(!played.stderr.contains("cannot receive"), "{}", played.stderr);
}
