//! Receives that are in flight during a delete or a shutdown.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use projectionist::{Queue, QueueError, Receipt, ReceivedMessage, SqsQueue, async_trait};
use tokio::sync::{Notify, watch};

use crate::queue::without_relay;
use crate::support::{
    Folder, Proxy, ProxyAction, RunningProcess, Tally, World, contains_text, eventually, registry,
};

/// The real queue with delays. A delete returns only after a later receive has been answered and
/// the test allows it. With `delays_receives`, a receive that has messages also waits for the test.
struct DelayingQueue {
    queue: Arc<SqsQueue>,
    requests: watch::Sender<u64>,
    responses: watch::Sender<u64>,
    delays_receives: bool,
    may_receive: Notify,
    may_delete: Notify,
}

impl DelayingQueue {
    fn new(world: &World, delays_receives: bool) -> Arc<Self> {
        let queue = Arc::clone(&world.queue);
        let (requests, responses) = (watch::Sender::new(0), watch::Sender::new(0));
        let (may_receive, may_delete) = (Notify::new(), Notify::new());
        Arc::new(DelayingQueue {
            queue,
            requests,
            responses,
            delays_receives,
            may_receive,
            may_delete,
        })
    }
}

#[async_trait]
impl Queue for DelayingQueue {
    async fn send(&self, body: &str, deduplication_id: &str) -> Result<(), QueueError> {
        self.queue.send(body, deduplication_id).await
    }

    async fn receive(&self, wait: Duration) -> Result<Vec<ReceivedMessage>, QueueError> {
        self.requests.send_modify(|requests| *requests += 1);
        let received = self.queue.receive(wait).await?;
        self.responses.send_modify(|responses| *responses += 1);
        if self.delays_receives && !received.is_empty() {
            self.may_receive.notified().await;
        }
        Ok(received)
    }

    async fn delete(&self, receipts: &[Receipt]) -> Result<(), QueueError> {
        let mut responses = self.responses.subscribe();
        let before = *responses.borrow();
        self.queue.delete(receipts).await?;
        responses.wait_for(|responses| *responses > before).await.expect("the sender exists");
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
    let settings = without_relay().with_receive_wait(Duration::from_secs(1));
    let playing = world.start_play_from(Arc::clone(&queue) as Arc<dyn Queue>, &registry, settings);
    queue
        .responses
        .subscribe()
        .wait_for(|responses| *responses == 2)
        .await
        .expect("the worker receives while it deletes");
    tokio::join!(playing.stop(), async { queue.may_delete.notify_one() });

    // The applied messages are done. The messages in flight are visible for the next worker,
    // although the visibility timeout is 30 s.
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
        let settings = without_relay().with_receive_wait(Duration::from_secs(20));
        let playing =
            world.start_play_from(Arc::clone(&queue) as Arc<dyn Queue>, &registry, settings);
        queue.requests.subscribe().wait_for(|requests| *requests == 1).await.expect("it polls");
        world.append(10).await;
        world.publish(10).await;
        queue
            .responses
            .subscribe()
            .wait_for(|responses| *responses == 1)
            .await
            .expect("the queue answers the poll");
        // The worker sees the shutdown first, and the response after that.
        let (played, ()) = tokio::join!(playing.stop(), async { queue.may_receive.notify_one() });

        assert_eq!((played.messages, world.position("tally").await), (0, 0));
        assert_eq!(
            world.peek().await.len(),
            1,
            "the message is visible before its timeout of 30 s"
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
        eventually("the worker polls", async || polls.load(Ordering::SeqCst)).await;
        play.signal("TERM").await;
        world.send_to("events", "a message").await;
        play.finish().await.exits(0);
        assert_eq!(
            world.peek().await,
            ["a message"],
            "the message is visible before its timeout of 30 s"
        );
    }
}
