//! The queue: lost, repeated, reordered and foreign messages never change the read models.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aws_sdk_sqs::types::QueueAttributeName;
use projectionist::sqlx::{self, MySqlConnection};
use projectionist::{
    Event, EventTypes, NewEvent, PlaySettings, Projector, Queue, Registry, RelaySettings, SqsQueue,
    async_trait,
};

use crate::support::{
    Faults, FaultyQueue, Gate, ScriptedProjector, TIMEOUT, Tally, World, event, eventually, gated,
    registry, seed,
};

/// Settings with small messages, so that there are many messages for the faults.
fn small_messages() -> PlaySettings {
    let relay =
        Some(RelaySettings::default().with_interval(Duration::from_millis(10)).with_max_events(3));
    World::play_settings().with_relay(relay)
}

/// Settings without a relay and, within a test, without reconciliation: events come only through
/// the queue.
pub fn without_relay() -> PlaySettings {
    World::continuous_play_settings().with_relay(None).with_reconcile_after(TIMEOUT)
}

impl World {
    /// Removes every message, as an operator would.
    async fn purge(&self) {
        self.sqs.purge_queue().queue_url(&self.queue_url).send().await.expect("purged");
        eventually("the queue is empty", async || self.depth().await == 0).await;
    }

    pub async fn depth(&self) -> u64 {
        self.queue.depth().await.expect("the queue answers")
    }

    /// The queue of this world with another visibility timeout.
    pub async fn queue_hiding(&self, visibility: Duration) -> SqsQueue {
        SqsQueue::with_client(self.sqs.clone(), &self.queue_url, visibility)
            .await
            .expect("the queue answers")
    }

    /// Publishes the unpublished events in a process of its own.
    pub async fn publish(&self, message_events: usize) {
        self.run(&["relay", "--once", "--message-events", &message_events.to_string()])
            .await
            .exits(0);
    }

    /// The bodies of the visible messages, which stay in the queue.
    pub async fn peek(&self) -> Vec<String> {
        let received = self.queue.receive(Duration::from_secs(1)).await.expect("the queue answers");
        let receipts: Vec<String> =
            received.iter().map(|message| message.receipt.clone()).collect();
        self.queue.change_visibility(&receipts, Duration::ZERO).await.expect("released");
        received.into_iter().map(|message| message.body).collect()
    }
}

async fn survive_every_fault(world: World) {
    let (all, closed) = (Tally::new("all_events"), Tally::new("closed").only(&["Closed"]));
    let registry = registry(&[&all, &closed]);
    world.boot(&registry).await;
    world.append(200).await;
    let faults = Faults {
        lost: 15,
        repeated: 15,
        malformed: 15,
        undeleted: 15,
        unacknowledged: 10,
        refused: 10,
        panics: 0,
        shuffled: true,
        unhidden: false,
    };
    // A malformed message stays hidden until its visibility timeout expires. Until then, a FIFO
    // queue returns no message of its group.
    let queue = world.queue_hiding(Duration::from_secs(1)).await;
    let queue = Arc::new(FaultyQueue::new(&queue, faults, seed()));
    let appending = async {
        for _ in 0..20 {
            world.append(5).await;
        }
    };
    tokio::join!(
        world.play_with(Arc::clone(&queue) as Arc<dyn Queue>, &registry, small_messages()),
        appending
    );
    // The first play may have become idle between two appends.
    world.play_with(Arc::clone(&queue) as Arc<dyn Queue>, &registry, small_messages()).await;

    world.assert_complete(&all).await;
    world.assert_complete(&closed).await;
    let fault_counts = queue.fault_counts();
    let each = [
        fault_counts.lost,
        fault_counts.repeated,
        fault_counts.malformed,
        fault_counts.undeleted,
        fault_counts.unacknowledged,
        fault_counts.refused,
    ];
    assert!(each.iter().all(|&times| times > 0), "{fault_counts:?}");
}

#[tokio::test]
async fn mixed_fifo_queue_faults_never_change_the_read_models() {
    survive_every_fault(World::new().await).await;
}

#[tokio::test]
async fn mixed_standard_queue_faults_never_change_the_read_models() {
    survive_every_fault(World::with_standard_queue().await).await;
}

#[tokio::test]
async fn messages_in_any_order_are_applied_in_log_order() {
    let world = World::with_standard_queue().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.append(200).await;
    world.publish(2).await;
    let shuffled = Faults { shuffled: true, repeated: 30, ..Faults::default() };
    let queue = Arc::new(FaultyQueue::new(&world.queue, shuffled, seed()));
    world.play_from(Arc::clone(&queue) as Arc<dyn Queue>, &registry).await;
    world.assert_complete(&tally).await;
    assert!(
        queue.fault_counts().shuffled > 3 && queue.fault_counts().repeated > 3,
        "{:?}",
        queue.fault_counts()
    );
}

#[tokio::test]
async fn a_purge_while_live_loses_no_event() {
    let world = World::new().await;
    let (gate, tally) = (Gate::new(), Tally::new("tally"));
    let registry = Registry::new().with(gated(&tally, 1, &gate)).expect("the name is unique");
    world.boot(&registry).await;
    world.append(100).await;
    world.publish(2).await;
    let settings = World::continuous_play_settings().with_relay(None);
    let playing =
        world.start_play_from(Arc::clone(&world.queue) as Arc<dyn Queue>, &registry, settings);
    gate.arrival().await;
    assert_eq!(world.depth().await, 50, "the worker holds some messages, and the others wait");
    world.purge().await;
    gate.open();
    eventually("the projector is at the end", async || world.position("tally").await == 100).await;
    assert!(playing.stop().await.messages <= 10, "the rest came from the store");
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_lost_last_message_on_an_idle_log_is_read_from_the_store() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.append(3).await;
    world.publish(10).await;
    let lost = world.queue.receive(Duration::from_secs(1)).await.expect("received");
    assert_eq!(lost.len(), 1);
    world.queue.delete(&[lost[0].receipt.clone()]).await.expect("deleted");
    assert_eq!(world.depth().await, 0);

    let played = world.play_until_idle(&registry).await;
    assert_eq!(played.messages, 0, "nothing came through the queue");
    world.assert_complete(&tally).await;
}

/// As with the retention of a queue that no worker has read for too long: the oldest messages are
/// gone without a notice.
#[tokio::test]
async fn messages_that_expired_while_no_worker_ran_are_read_from_the_store() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.append(60).await;
    world.publish(10).await;
    let received = world.queue.receive(Duration::from_secs(1)).await.expect("received");
    let receipts: Vec<String> = received.into_iter().map(|message| message.receipt).collect();
    assert_eq!(receipts.len(), 6);
    world.queue.delete(&receipts[..4]).await.expect("deleted");
    world.queue.change_visibility(&receipts[4..], Duration::ZERO).await.expect("released");

    let played = world
        .play_with(Arc::clone(&world.queue) as Arc<dyn Queue>, &registry, World::play_settings())
        .await;
    assert_eq!(played.messages, 2, "the rest came from the store");
    world.assert_complete(&tally).await;
}

/// A projector that stores the payload of every event.
pub struct Payloads;

#[async_trait]
impl Projector for Payloads {
    fn name(&self) -> &str {
        "payloads"
    }

    fn event_types(&self) -> EventTypes {
        EventTypes::All
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        sqlx::query(
            "create table if not exists payloads \
             (position bigint unsigned primary key, payload mediumtext not null)",
        )
        .execute(db)
        .await?;
        Ok(())
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let insert = sqlx::query("insert into payloads values (?, ?)");
        insert.bind(event.position().get()).bind(event.payload_text()).execute(db).await?;
        Ok(())
    }
}

pub async fn assert_payloads(world: &World) {
    let payloads = |table: &str| {
        format!("select group_concat(sha2(payload, 256) order by position) from {table}")
    };
    let hash_of = async |table| -> String {
        let sql = sqlx::AssertSqlSafe(payloads(table));
        sqlx::query_scalar(sql)
            .fetch_one(&mut world.connection().await)
            .await
            .expect("some payloads")
    };
    assert_eq!(hash_of("payloads").await, hash_of("events").await);
}

fn with_payload(number: usize, bytes: usize) -> NewEvent {
    NewEvent { payload: format!("\"{}\"", "é".repeat(bytes / 2)), ..event(number) }
}

#[tokio::test]
async fn an_event_too_large_for_a_message_is_sent_as_a_reference() {
    for fifo in [true, false] {
        let world =
            World::with_queue(fifo, &[(QueueAttributeName::MaximumMessageSize, "1024")]).await;
        let registry = Registry::new().with(Payloads).expect("the name is unique");
        world.boot(&registry).await;
        let events: Vec<NewEvent> = [50, 5_000, 50, 1_500]
            .into_iter()
            .enumerate()
            .map(|(n, size)| with_payload(n, size))
            .collect();
        world.store.append(&events).await.expect("appended");
        world.publish(1_000).await;
        assert_eq!(world.depth().await, 4);
        if !fifo {
            let bodies = world.peek().await;
            assert!(bodies.iter().all(|body| body.len() <= 1_024));
            let references = bodies
                .iter()
                .filter(|body| body.contains("\"last\"") && !body.contains("\"events\""));
            assert_eq!(references.count(), 2, "{bodies:?}");
        }
        world.play_until_idle(&registry).await;
        assert_eq!(world.position("payloads").await, 4);
        assert_payloads(&world).await;
    }
}

#[tokio::test]
async fn a_two_megabyte_payload_arrives_unchanged() {
    let world = World::new().await;
    let registry = Registry::new().with(Payloads).expect("the name is unique");
    world.store.append(&[with_payload(0, 2_000_000)]).await.expect("appended");
    world.boot(&registry).await;
    world.store.append(&[with_payload(1, 2_000_000), with_payload(2, 10)]).await.expect("appended");
    let played = world.play_until_idle(&registry).await;
    assert!(played.messages >= 2, "{played:?}");
    assert_eq!(world.position("payloads").await, 3);
    assert_payloads(&world).await;
}

#[tokio::test]
async fn a_message_that_becomes_visible_while_being_applied_is_applied_once() {
    let world = World::with_standard_queue().await;
    let (gate, tally) = (Gate::new(), Tally::new("tally"));
    let registry = Registry::new().with(gated(&tally, 1, &gate)).expect("the name is unique");
    world.boot(&registry).await;
    world.append(10).await;
    world.publish(2).await;

    let queue = world.queue_hiding(Duration::from_secs(1)).await;
    let unhidden =
        || Arc::new(FaultyQueue::new(&queue, Faults { unhidden: true, ..Faults::default() }, 0));
    let (first, second) = (unhidden(), unhidden());
    let slow =
        world.start_play_from(Arc::clone(&first) as Arc<dyn Queue>, &registry, without_relay());
    gate.arrival().await;
    let other =
        world.start_play_from(Arc::clone(&second) as Arc<dyn Queue>, &registry, without_relay());
    eventually("the second worker has the first one's messages", async || {
        second.fault_counts().received == 5
    })
    .await;
    eventually("the second worker waits for the row that the first has locked", async || {
        world.lock_waits().await == 1
    })
    .await;
    assert_eq!(first.fault_counts().received, 5);
    assert!(first.fault_counts().unhidden > 0);

    gate.open();
    eventually("all is applied and deleted", async || {
        world.position("tally").await == 10 && world.depth().await == 0
    })
    .await;
    slow.stop().await;
    other.stop().await;
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn an_expired_receipt_is_not_an_error_and_the_new_receipt_deletes() {
    for world in [World::new().await, World::with_standard_queue().await] {
        world.append(1).await;
        world.publish(1).await;
        let queue = world.queue_hiding(Duration::from_secs(1)).await;
        let receive = async || {
            queue.receive(Duration::from_secs(20)).await.expect("received").remove(0).receipt
        };
        let (stale, valid) = (receive().await, receive().await);
        queue.delete(&[stale]).await.expect("an expired receipt is not an error");
        queue.delete(&[valid]).await.expect("deleted");
        assert_eq!(world.depth().await, 0);
    }
}

#[tokio::test]
async fn work_longer_than_the_visibility_timeout_keeps_its_messages_hidden() {
    let world = World::with_standard_queue().await;
    let (gate, tally) = (Gate::new(), Tally::new("tally"));
    let registry = Registry::new().with(gated(&tally, 1, &gate)).expect("the name is unique");
    world.boot(&registry).await;
    world.append(1).await;
    world.publish(1).await;
    let queue = world.queue_hiding(Duration::from_secs(2)).await;
    let playing = world.start_play_from(Arc::new(queue.clone()), &registry, without_relay());
    gate.arrival().await;
    // Two long polls last twice as long as the visibility timeout.
    for _ in 0..2 {
        assert_eq!(queue.receive(Duration::from_secs(2)).await.expect("the queue answers"), []);
    }
    gate.open();
    eventually("the message is deleted", async || world.depth().await == 0).await;
    assert_eq!(playing.stop().await.messages, 1);
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_republished_event_is_not_applied_again() {
    for world in [World::new().await, World::with_standard_queue().await] {
        let tally = Tally::new("tally");
        let registry = registry(&[&tally]);
        world.boot(&registry).await;
        world.append(50).await;
        world.play_until_idle(&registry).await;
        world.assert_complete(&tally).await;
        world.execute("update event_log set published = 0").await;
        // The messages end at other positions than before, so that a FIFO queue accepts them.
        world.publish(7).await;
        assert_eq!(world.depth().await, 8);
        assert_eq!(world.play_until_idle(&registry).await.messages, 8);
        world.assert_complete(&tally).await;
    }
}

#[tokio::test]
async fn events_dropped_by_fifo_deduplication_are_read_from_the_store() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.append(50).await;
    world.publish(10).await;
    assert_eq!(world.depth().await, 5);
    while world.depth().await > 0 {
        let lost = world.queue.receive(Duration::from_secs(1)).await.expect("received");
        let receipts: Vec<String> = lost.into_iter().map(|message| message.receipt).collect();
        world.queue.delete(&receipts).await.expect("deleted");
    }
    world.execute("update event_log set published = 0").await;
    world.publish(10).await;
    assert_eq!(world.depth().await, 0, "the queue drops duplicates for five minutes");
    world.play_until_idle(&registry).await;
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_relay_that_crashed_after_sending_resends_harmlessly() {
    let world = World::with_standard_queue().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    world.boot(&registry).await;
    world.append(60).await;
    let faults = Faults { unacknowledged: 40, ..Faults::default() };
    let queue = Arc::new(FaultyQueue::new(&world.queue, faults, seed()));
    let played =
        world.play_with(Arc::clone(&queue) as Arc<dyn Queue>, &registry, small_messages()).await;
    assert!(queue.fault_counts().unacknowledged > 0);
    assert_eq!(
        played.messages,
        20 + queue.fault_counts().unacknowledged,
        "each unacknowledged message is sent once more"
    );
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn no_message_is_deleted_before_every_live_projector_has_committed_it() {
    let world = World::new().await;
    let (gate, quick, slow) = (Gate::new(), Tally::new("quick"), Tally::new("slow"));
    let registry = Registry::new()
        .with(quick.clone())
        .and_then(|registry| registry.with(gated(&slow, 3, &gate)))
        .expect("the names are unique");
    world.boot(&registry).await;
    world.append(5).await;
    world.publish(1).await;
    let queue = Arc::new(FaultyQueue::without_faults(&world.queue));
    let playing =
        world.start_play_from(Arc::clone(&queue) as Arc<dyn Queue>, &registry, without_relay());
    gate.arrival().await;
    assert_eq!((world.position("quick").await, world.position("slow").await), (5, 0));
    assert_eq!((world.depth().await, queue.fault_counts().deleted), (5, 0));
    gate.open();
    eventually("all are deleted", async || world.depth().await == 0).await;
    assert_eq!(world.position("slow").await, 5, "committed before the deletion");
    playing.stop().await;
    world.assert_complete(&quick).await;
    world.assert_complete(&slow).await;
}

#[tokio::test]
async fn a_message_larger_than_a_batch_is_applied_in_several_transactions() {
    let world = World::new().await;
    let transactions = Arc::new(AtomicU64::new(0));
    let (tally, seen) = (Tally::new("tally"), Arc::clone(&transactions));
    world.append(1).await;
    let last = Arc::new(AtomicU64::new(0));
    let scripted = ScriptedProjector::new(&tally, move |_, db| {
        let (seen, last) = (Arc::clone(&seen), Arc::clone(&last));
        Box::pin(async move {
            // The transaction reads the position that it has written. That position is different
            // in each transaction.
            let own: u64 =
                sqlx::query_scalar("select position from projectors where name = 'tally'")
                    .fetch_one(db)
                    .await?;
            if last.swap(own, Ordering::SeqCst) != own {
                seen.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        })
    });
    let registry = Registry::new().with(scripted).expect("the name is unique");
    world.boot(&registry).await;
    world.append(250).await;
    world.publish(250).await;
    assert_eq!(world.depth().await, 1);
    let played = world.play_until_idle(&registry).await;
    assert_eq!(played.messages, 1);
    assert_eq!(transactions.load(Ordering::SeqCst), 3, "at most a hundred events each");
    world.assert_complete(&tally).await;
}
