//! Receives that are under way before they are waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use projectionist::{
    PlaySettings, Queue, QueueError, Receipt, ReceivedMessage, SqsQueue, async_trait,
};
use tokio::sync::{Notify, watch};

use crate::queue::without_relay;
use crate::support::{
    Folder, Proxy, ProxyAction, RunningProcess, Tally, World, contains_text, eventually, registry,
};

/// The real queue. Its deletions are answered when it has been asked for more, has answered that,
/// and the test allows it. So are receives that bring messages, if `delays_receives` is set.
struct DelayingQueue {
    queue: Arc<SqsQueue>,
    asked: watch::Sender<u64>,
    answered: watch::Sender<u64>,
    delays_receives: bool,
    may_receive: Notify,
    may_delete: Notify,
}

impl DelayingQueue {
    fn new(world: &World, delays_receives: bool) -> Arc<Self> {
        let queue = Arc::clone(&world.queue);
        let (asked, answered) = (watch::Sender::new(0), watch::Sender::new(0));
        let (may_receive, may_delete) = (Notify::new(), Notify::new());
        Arc::new(DelayingQueue { queue, asked, answered, delays_receives, may_receive, may_delete })
    }
}

#[async_trait]
impl Queue for DelayingQueue {
    async fn send(&self, body: &str, deduplication_id: &str) -> Result<(), QueueError> {
        self.queue.send(body, deduplication_id).await
    }

    async fn receive(&self, wait: Duration) -> Result<Vec<ReceivedMessage>, QueueError> {
        self.asked.send_modify(|asked| *asked += 1);
        let received = self.queue.receive(wait).await?;
        self.answered.send_modify(|answered| *answered += 1);
        if self.delays_receives && !received.is_empty() {
            self.may_receive.notified().await;
        }
        Ok(received)
    }

    async fn delete(&self, receipts: &[Receipt]) -> Result<(), QueueError> {
        let mut answered = self.answered.subscribe();
        let before = *answered.borrow();
        self.queue.delete(receipts).await?;
        answered.wait_for(|answered| *answered > before).await.expect("the queue is there still");
        self.may_delete.notified().await;
        Ok(())
    }

    async fn change_visibility(
        &self,
        receipts: &[Receipt],
        duration: Duration,
    ) -> Result<(), QueueError> {
        self.queue.change_visibility(receipts, duration).await
    }

    async fn depth(&self) -> Result<u64, QueueError> {
        self.queue.depth().await
    }

    fn visibility_timeout(&self) -> Duration {
        self.queue.visibility_timeout()
    }

    fn max_message_bytes(&self) -> usize {
        self.queue.max_message_bytes()
    }
}

#[tokio::test]
async fn fifo_messages_received_during_a_delete_are_released_at_shutdown() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.append(30).await;
    world.publish(1).await;

    let queue = DelayingQueue::new(&world, false);
    let settings = PlaySettings { receive_wait: Duration::from_secs(1), ..without_relay() };
    let playing = world.start_play_from(Arc::clone(&queue) as Arc<dyn Queue>, &registry, settings);
    queue
        .answered
        .subscribe()
        .wait_for(|answered| *answered == 2)
        .await
        .expect("it is asked while it deletes");
    tokio::join!(playing.stop(), async { queue.may_delete.notify_one() });

    // What was in work is done; what was on its way is there for the next, although it would be
    // hidden for 30 s.
    let position = world.position("tally").await;
    assert!((1..30).contains(&position), "{position}");
    assert_eq!(world.peek().await.len(), 10);
    world.play_until_idle(&registry).await;
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn messages_from_a_long_poll_during_shutdown_are_released() {
    for world in [World::new().await, World::with_standard_queue().await] {
        let tally = Tally::new("tally");
        let registry = registry(&[&tally]);
        world.boot(&registry).await;
        let queue = DelayingQueue::new(&world, true);
        let settings = PlaySettings { receive_wait: Duration::from_secs(20), ..without_relay() };
        let playing =
            world.start_play_from(Arc::clone(&queue) as Arc<dyn Queue>, &registry, settings);
        queue.asked.subscribe().wait_for(|asked| *asked == 1).await.expect("it polls");
        world.append(10).await;
        world.publish(10).await;
        queue
            .answered
            .subscribe()
            .wait_for(|answered| *answered == 1)
            .await
            .expect("the queue answers the poll");
        // The worker sees the shutdown first, and the answer then.
        let (played, ()) = tokio::join!(playing.stop(), async { queue.may_receive.notify_one() });

        assert_eq!((played.messages, world.position("tally").await), (0, 0));
        assert_eq!(
            world.peek().await.len(),
            1,
            "it is visible, although it would be hidden for 30 s"
        );
        world.play_until_idle(&registry).await;
        world.assert_complete(&tally).await;
    }
}

#[tokio::test]
async fn messages_from_a_long_poll_after_sigterm_are_released() {
    for world in [World::new().await, World::with_standard_queue().await] {
        let tally = Tally::new("tally");
        let projectors = Folder::new().with("tally.toml", &tally.file(&[]));
        world.run(&["boot", "--projectors", projectors.path()]).await.exits(0);
        let polls = Arc::new(AtomicBool::new(false));
        let has_polled = Arc::clone(&polls);
        let proxy = Proxy::for_queue(move |bytes| {
            has_polled.fetch_or(contains_text(bytes, "AmazonSQS.ReceiveMessage"), Ordering::SeqCst);
            ProxyAction::Forward
        })
        .await;
        let mut play = world.command(&[
            "play",
            "--no-relay",
            "--receive-wait=20",
            "--projectors",
            projectors.path(),
        ]);
        play.env("AWS_ENDPOINT_URL", format!("http://{}", proxy.address()));
        let play = RunningProcess::spawn(play);
        eventually("it polls", async || polls.load(Ordering::SeqCst)).await;
        play.signal("TERM").await;
        world.send_to("events", "a message").await;
        play.finish().await.exits(0);
        assert_eq!(
            world.peek().await,
            ["a message"],
            "it is visible, although it would be hidden for 30 s"
        );
    }
}
