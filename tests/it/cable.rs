//! Cables that go silent, so that nobody is told.

use std::sync::atomic::{AtomicU64, Ordering};

use projectionist::Queue;

use crate::support::{Fate, Proxy, Running, Tally, World, eventually, holds, registry, setting};

/// Really killed, between the queue's taking a message and the note of it.
#[tokio::test]
async fn a_relay_that_is_killed_after_sending_and_before_it_notes_so_costs_nothing() {
    for (world, sent_again) in [(World::new().await, 0), (World::with_standard_queue().await, 1)] {
        let tally = Tally::new("tally");
        let registry = registry(&[&tally]);
        world.boot(&registry).await;
        world.append(60).await;
        let endpoint = setting("AWS_ENDPOINT_URL").expect("the parts are up");
        let sends = AtomicU64::new(0);
        let proxy = Proxy::new(endpoint.trim_start_matches("http://").trim_end_matches('/'), move |bytes| {
            let is_second = holds(bytes, "AmazonSQS.SendMessage") && sends.fetch_add(1, Ordering::SeqCst) == 1;
            if is_second { Fate::Withheld } else { Fate::Passes }
        })
        .await;
        let mut relay = world.command(&["relay", "--message-events", "20"]);
        relay.env("AWS_ENDPOINT_URL", format!("http://{}", proxy.address()));
        let relay = Running::spawn(relay);
        eventually("the queue has taken the second message", async || proxy.withheld() > 0).await;
        assert!(relay.strike_down().await, "it was running");
        assert_eq!(world.number("select published from event_log").await, 20);
        assert_eq!(world.queue.depth().await.expect("the queue answers"), 2);

        let published = world.run(&["relay", "--once", "--message-events", "20"]).await.exits(0);
        assert!(published.stdout.contains("published 40 events, up to position 60"), "{}", published.stdout);
        assert_eq!(world.queue.depth().await.expect("the queue answers"), 3 + sent_again);
        assert_eq!(world.play_until_idle(&registry).await.messages, 3 + sent_again);
        world.assert_complete(&tally).await;
    }
}
