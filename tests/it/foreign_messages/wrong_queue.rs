//! A process on another queue than the one to which the log was published.

use projectionist::Queue;
use serde_json::Value;

use crate::support::{Folder, Tally, World};

/// The two queues that each `queue_changed` alert of a process names.
fn changes(log: &[Value]) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().expect("the value is text").to_owned();
    let changed = log.iter().filter(|line| line["alert"] == "queue_changed");
    changed.map(|line| (text(&line["queue"]), text(&line["published_to"]))).collect()
}

#[tokio::test]
async fn a_process_on_the_wrong_queue_warns_until_the_log_is_published_there() {
    let (world, other) = (World::new().await, World::new().await);
    let tally = Tally::new("tally");
    let projectors = Folder::new().with("tally.toml", &tally.file(&[]));
    world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
    let [here, there] =
        [&world, &other].map(|world| world.queue.identity().expect("the queue has an ARN"));
    let play = ["play", "--until-idle", "--projectors", projectors.path()];
    world.append(1).await;
    assert_eq!(changes(&world.run(&play).await.exits(0).log()), [], "nothing was published before");
    assert_eq!(changes(&world.run(&play).await.exits(0).log()), [], "the same queue");

    let there_too = [&play[..], &["--queue-url", &other.queue_url]].concat();
    let expected = vec![(there.clone(), here.clone())];
    let mut only_listens = there_too.clone();
    only_listens.push("--no-relay");
    assert_eq!(changes(&world.run(&only_listens).await.exits(0).log()), expected);
    assert_eq!(
        changes(
            &world.run(&["relay", "--once", "--queue-url", &other.queue_url]).await.exits(0).log()
        ),
        expected
    );
    let doctor =
        world.run(&["doctor", "--json", "--queue-url", &other.queue_url]).await.exits(0).json();
    let checks = doctor["checks"].as_array().expect("the report has checks").iter();
    let check = checks
        .clone()
        .find(|check| check["name"] == "published to")
        .expect("doctor has this check");
    assert_eq!(check["level"], "warning");
    assert!(
        check["detail"].as_str().is_some_and(|says| says.contains(&here))
            && check["remedy"].is_string(),
        "{check}"
    );

    // After this process has published, its queue is the log's queue.
    world.append(1).await;
    assert_eq!(changes(&world.run(&there_too).await.exits(0).log()), expected);
    assert_eq!(changes(&world.run(&there_too).await.exits(0).log()), []);
    assert_eq!(changes(&world.run(&["relay", "--once"]).await.exits(0).log()), [(here, there)]);
    world.assert_complete(&tally).await;
}
