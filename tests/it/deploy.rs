//! Deploys: releases that alternate on one database, and their effect on the queue.

use aws_sdk_sqs::types::QueueAttributeName;
use projectionist::Registry;

use crate::support::{Gate, Tally, World, gated, registry};

#[tokio::test]
async fn a_release_rolled_back_and_deployed_again_misses_no_event() {
    let world = World::new().await;
    let (old, new) = (Tally::new("old_one"), Tally::new("new_one"));
    let (first, second) = (registry(&[&old]), registry(&[&old, &new]));
    world.append(50).await;
    world.boot(&first).await;
    world.play_until_idle(&first).await;
    world.append(50).await;
    assert!(world.boot(&second).await.is_released());
    world.play_until_idle(&second).await;

    // Roll back: the first release does not know the new projector, and consumes the queue without
    // it.
    world.append(50).await;
    assert!(world.boot(&first).await.is_released());
    world.play_until_idle(&first).await;
    assert_eq!(
        (world.position("new_one").await, world.status("new_one").await),
        (100, "live".into())
    );

    // Deploy the second release again.
    world.append(50).await;
    assert!(world.boot(&second).await.is_released());
    world.play_until_idle(&second).await;
    world.assert_complete(&old).await;
    world.assert_complete(&new).await;
}

#[tokio::test]
async fn a_queue_purged_during_a_boot_loses_no_event() {
    let world = World::new().await;
    let (live, booted) = (Tally::new("live_one"), Tally::new("booted"));
    world.append(50).await;
    world.boot(&registry(&[&live])).await;
    world.append(100).await;
    world.run(&["relay", "--once"]).await.exits(0);

    let gate = Gate::new();
    let registry = Registry::new()
        .with(live.clone())
        .and_then(|r| r.with(gated(&booted, 75, &gate)))
        .expect("the names are unique");
    let purging = async {
        gate.arrival().await;
        world
            .sqs
            .purge_queue()
            .queue_url(&world.queue_url)
            .send()
            .await
            .expect("the queue is purged");
        gate.open();
    };
    let (report, ()) = tokio::join!(world.boot(&registry), purging);
    assert!(report.is_released());
    world.play_until_idle(&registry).await;
    world.assert_complete(&live).await;
    world.assert_complete(&booted).await;
}

#[tokio::test]
async fn a_projector_retired_and_added_again_is_rebuilt() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.append(50).await;
    world.boot(&registry).await;
    // The table is dropped by hand, because the shipped binary does not contain this projector in
    // Rust.
    world.run(&["retire", "tally", "--yes"]).await.exits(0);
    world.execute("drop table tally").await;
    assert_eq!(world.status("tally").await, "new");

    world.append(50).await;
    assert!(world.boot(&registry).await.is_released());
    world.play_until_idle(&registry).await;
    world.assert_complete(&tally).await;
}

/// This cannot be prevented: without its row, nothing records that the projector was retired. The
/// README says so.
#[tokio::test]
async fn a_retired_projector_with_its_row_deleted_by_hand_is_new_again() {
    let world = World::new().await;
    let mails = Tally::new("mails").with_side_effects();
    let registry = registry(&[&mails]);
    world.append(20).await;
    world.boot(&registry).await;
    world.run(&["retire", "mails", "--yes"]).await.exits(0);
    world.append(20).await;
    // With its row, the projector stays retired, however often a release contains it.
    assert!(world.boot(&registry).await.is_released());
    world.play_until_idle(&registry).await;
    assert_eq!(
        (world.status("mails").await, world.position("mails").await),
        ("retired".into(), 20)
    );
    assert_eq!(mails.applied(&world).await, (1..=20).collect::<Vec<_>>());

    world.execute("delete from projectors where name = 'mails'").await;
    assert_eq!(world.status("mails").await, "new");
    // Play does not start it without a boot.
    world.play_until_idle(&registry).await;
    assert_eq!(mails.applied(&world).await, (1..=20).collect::<Vec<_>>());
    assert!(world.boot(&registry).await.is_released());
    assert_eq!((world.status("mails").await, world.position("mails").await), ("live".into(), 40));
    assert_eq!(mails.applied(&world).await, (1..=20).chain(1..=40).collect::<Vec<_>>());
}

#[tokio::test]
async fn events_moved_to_a_dead_letter_queue_are_read_from_the_store() {
    let dead_letters = World::new().await;
    let arn = dead_letters
        .sqs
        .get_queue_attributes()
        .queue_url(&dead_letters.queue_url)
        .attribute_names(QueueAttributeName::QueueArn)
        .send()
        .await
        .expect("the queue has attributes");
    let arn = arn
        .attributes
        .and_then(|all| all.get(&QueueAttributeName::QueueArn).cloned())
        .expect("the queue has an ARN");
    let redrive = format!("{{\"deadLetterTargetArn\":\"{arn}\",\"maxReceiveCount\":\"1\"}}");
    let world = World::with_queue(true, &[(QueueAttributeName::RedrivePolicy, &redrive)]).await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.append(60).await;
    world.run(&["relay", "--once", "--message-events", "20"]).await.exits(0);

    // Another consumer receives the first message and does not delete it. The queue allows one
    // receive.
    let head = world
        .sqs
        .receive_message()
        .queue_url(&world.queue_url)
        .visibility_timeout(0)
        .send()
        .await
        .expect("the queue answers");
    assert_eq!(head.messages().len(), 1, "one message is received");
    world.play_until_idle(&registry).await;
    world.assert_complete(&tally).await;
    let dead = dead_letters
        .sqs
        .receive_message()
        .queue_url(&dead_letters.queue_url)
        .wait_time_seconds(5)
        .send()
        .await;
    assert_eq!(
        dead.expect("the queue answers").messages().len(),
        1,
        "the message is in the dead-letter queue"
    );
}
