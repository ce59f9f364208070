//! Receives that are under way before they are waited for.

use std::sync::Arc;
use std::time::Duration;

use projectionist::{PlaySettings, Queue, QueueError, Receipt, Received, SqsQueue, async_trait};
use tokio::sync::{Notify, watch};

use crate::queue::without_relay;
use crate::support::{Tally, World, registry};

/// The real queue, whose deletions are answered when it has been asked for more, has answered that, and the test lets it.
struct Unhurried {
    queue: Arc<SqsQueue>,
    answered: watch::Sender<u64>,
    may_delete: Notify,
}

#[async_trait]
impl Queue for Unhurried {
    async fn send(&self, body: &str, deduplication_id: &str) -> Result<(), QueueError> {
        self.queue.send(body, deduplication_id).await
    }

    async fn receive(&self, wait: Duration) -> Result<Vec<Received>, QueueError> {
        let received = self.queue.receive(wait).await?;
        self.answered.send_modify(|answered| *answered += 1);
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

    async fn hide(&self, receipts: &[Receipt], duration: Duration) -> Result<(), QueueError> {
        self.queue.hide(receipts, duration).await
    }

    async fn depth(&self) -> Result<u64, QueueError> {
        self.queue.depth().await
    }

    fn visibility(&self) -> Duration {
        self.queue.visibility()
    }

    fn max_message_bytes(&self) -> usize {
        self.queue.max_message_bytes()
    }
}

#[tokio::test]
async fn what_a_fifo_queue_hands_out_while_it_deletes_is_given_back_at_the_end() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.append(30).await;
    world.publish(1).await;

    let (answered, may_delete) = (watch::Sender::new(0), Notify::new());
    let queue = Arc::new(Unhurried { queue: Arc::clone(&world.queue), answered, may_delete });
    let settings = PlaySettings { receive_wait: Duration::from_secs(1), ..without_relay() };
    let playing = world.start_play_from(Arc::clone(&queue) as Arc<dyn Queue>, &registry, settings);
    queue.answered.subscribe().wait_for(|answered| *answered == 2).await.expect("it is asked while it deletes");
    tokio::join!(playing.stop(), async { queue.may_delete.notify_one() });

    // What was in work is done; what was on its way is there for the next, although it would be hidden for 30 s.
    let position = world.position("tally").await;
    assert!((1..30).contains(&position), "{position}");
    assert_eq!(world.peek().await.len(), 10);
    world.play_until_idle(&registry).await;
    world.assert_complete(&tally).await;
}
