//! The simulated queue: FIFO with one message group, or standard. It loses, repeats and reorders
//! messages. A received message is hidden until its visibility timeout ends. A message that is
//! received too often goes to the dead-letter queue, so the simulation drops it.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::invariants;
use super::occurrence::Occurrence;
use super::projectors::Release;
use super::world::{ProcessId, Sim, Tick, World};
use crate::model::event::Position;

/// How long a received message stays hidden.
pub(super) const VISIBILITY_TIMEOUT: Tick = 40;

/// How long a FIFO queue drops further messages with the same deduplication id.
const DEDUPLICATION_WINDOW: Tick = 300;

/// The most messages in one receive.
const MAX_BATCH: usize = 10;

/// A message that is received more often than this goes to the dead-letter queue.
const MAX_RECEIVES: u32 = 3;

/// Identifies one delivery of a message, for its deletion.
pub(super) type Receipt = u64;

#[derive(Default)]
pub(super) struct Queue {
    pub(super) is_fifo: bool,
    pub(super) messages: Vec<Message>,
    sent: BTreeMap<String, Tick>,
    last_receipt: Receipt,
}

#[derive(Debug, Clone)]
pub(super) struct Message {
    pub(super) body: Rc<str>,
    /// The position of its last event; `None` for a foreign message.
    pub(super) last: Option<Position>,
    pub(super) hidden_until: Tick,
    receives: u32,
    /// All deliveries of this message. Each receiver may still try to delete it.
    deliveries: Vec<Delivery>,
}

/// One delivery of a message to a process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Delivery {
    receipt: Receipt,
    by: ProcessId,
    pub(super) received_at: Tick,
}

/// A message as a receive returns it.
pub(super) struct ReceivedMessage {
    pub(super) receipt: Receipt,
    pub(super) body: Rc<str>,
}

/// The queue did not answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueError;

impl Queue {
    fn is_hidden(message: &Message, clock: Tick) -> bool {
        message.hidden_until > clock
    }

    /// The indexes of the messages that a receive would return now, in order.
    fn visible(&self, clock: Tick) -> Vec<usize> {
        // A FIFO queue returns no message while another one of the group is hidden.
        if self.is_fifo && self.messages.iter().any(|message| Queue::is_hidden(message, clock)) {
            return Vec::new();
        }
        (0..self.messages.len())
            .filter(|&at| !Queue::is_hidden(&self.messages[at], clock))
            .collect()
    }
}

impl World {
    /// Adds a message, unless a FIFO queue drops it as a duplicate.
    pub(super) fn enqueue(
        &mut self,
        body: &str,
        last: Option<Position>,
        deduplication_id: Option<&str>,
    ) {
        let clock = self.clock;
        if let Some(id) = deduplication_id.filter(|_| self.queue.is_fifo) {
            if self.queue.sent.get(id).is_some_and(|&sent| clock - sent < DEDUPLICATION_WINDOW) {
                self.record(Occurrence::MessageDeduplicated);
                self.trace(|| "the queue drops a duplicate".into());
                return;
            }
            self.queue.sent.insert(id.to_owned(), clock);
        }
        let message = Message {
            body: body.into(),
            last,
            hidden_until: 0,
            receives: 0,
            deliveries: Vec::new(),
        };
        self.queue.messages.push(message);
        self.arrivals += 1;
    }

    /// Receives visible messages: up to ten, a random number.
    fn take_visible(&mut self) -> Vec<ReceivedMessage> {
        let clock = self.clock;
        let mut visible = self.queue.visible(clock);
        if !self.queue.is_fifo && visible.len() > 1 {
            self.rng.shuffle(&mut visible);
            self.record(Occurrence::MessagesReordered);
        }
        let most = self.rng.usize(1..=MAX_BATCH);
        visible.truncate(most);
        let mut received = Vec::with_capacity(visible.len());
        let mut dead = Vec::new();
        for at in visible {
            self.queue.last_receipt += 1;
            let (receipt, message) = (self.queue.last_receipt, &mut self.queue.messages[at]);
            message.receives += 1;
            if message.receives > MAX_RECEIVES {
                dead.push(at);
                continue;
            }
            message.hidden_until = clock + VISIBILITY_TIMEOUT;
            message.deliveries.push(Delivery { receipt, by: self.process_id, received_at: clock });
            let (receives, body) = (message.receives, Rc::clone(&message.body));
            if receives > 1 {
                self.record(Occurrence::TwoWorkersOneMessage);
            }
            received.push(ReceivedMessage { receipt, body });
        }
        dead.sort_unstable();
        for at in dead.into_iter().rev() {
            self.record(Occurrence::DeadLettered);
            self.trace(|| format!("a message goes to the dead-letter queue: {at}"));
            self.queue.messages.remove(at);
        }
        received
    }

    /// Makes the messages visible again that a worker received last.
    pub(super) fn return_messages(&mut self, process_id: ProcessId) {
        for message in &mut self.queue.messages {
            if message.deliveries.last().is_some_and(|delivery| delivery.by == process_id) {
                message.hidden_until = 0;
            }
        }
        self.arrivals += 1;
    }

    fn delete(&mut self, receipt: Receipt, release: Release) {
        let holds = |message: &Message| {
            message.deliveries.iter().any(|delivery| delivery.receipt == receipt)
        };
        let Some(at) = self.queue.messages.iter().position(holds) else { return };
        let message = &self.queue.messages[at];
        let is_stale = message.deliveries.last().is_none_or(|delivery| delivery.receipt != receipt)
            || !Queue::is_hidden(message, self.clock);
        if is_stale {
            self.record(Occurrence::StaleReceipt);
            // A FIFO queue rejects a stale receipt. A standard queue may accept it.
            if self.queue.is_fifo || self.rng.bool() {
                self.trace(|| "a stale receipt deletes nothing".into());
                return;
            }
        }
        let message = self.queue.messages.remove(at);
        self.arrivals += 1;
        self.trace(|| {
            format!("a message through {:?} is deleted", message.last.map(Position::get))
        });
        if let Some(delivery) =
            message.deliveries.iter().find(|delivery| delivery.receipt == receipt)
        {
            invariants::before_delete(self, &message, delivery, release);
        }
    }
}

impl Sim {
    async fn request(&self) -> Result<(), QueueError> {
        self.step().await;
        let mut world = self.world();
        let chance = world.chances.queue_unavailable;
        if world.roll(chance) {
            world.record(Occurrence::QueueUnavailable);
            world.trace(|| "the queue does not answer".into());
            return Err(QueueError);
        }
        Ok(())
    }

    /// Sends a message that the relay has packed.
    pub(super) async fn send(
        &self,
        body: &str,
        last: Position,
        deduplication_id: &str,
    ) -> Result<(), QueueError> {
        self.request().await?;
        let mut world = self.world();
        invariants::before_send(&mut world, last);
        let (loses, repeats) = (world.chances.message_loss, world.chances.message_repeat);
        world.trace(|| format!("sends a message through {last}"));
        world.record(Occurrence::MessageSent);
        if world.roll(loses) {
            world.record(Occurrence::MessageLost);
            world.trace(|| "the queue loses the message".into());
            return Ok(());
        }
        world.enqueue(body, Some(last), Some(deduplication_id));
        if world.roll(repeats) {
            world.record(Occurrence::MessageRepeated);
            world.enqueue(body, Some(last), None);
        }
        // The answer may be lost although the message was sent. The relay then sends it again.
        let chance = world.chances.queue_unavailable;
        if world.roll(chance) { Err(QueueError) } else { Ok(()) }
    }

    /// Receives up to ten messages, waiting up to `wait` for the first.
    pub(super) async fn receive(&self, wait: Tick) -> Result<Vec<ReceivedMessage>, QueueError> {
        self.request().await?;
        let until = self.now() + wait;
        loop {
            let received = self.world().take_visible();
            if !received.is_empty() || self.now() >= until {
                self.trace(|| format!("receives {} messages", received.len()));
                return Ok(received);
            }
            self.wait_for_arrival(until).await;
        }
    }

    /// Deletes messages, as a worker of this release.
    pub(super) async fn delete(
        &self,
        receipts: &[Receipt],
        release: Release,
    ) -> Result<(), QueueError> {
        self.request().await?;
        for &receipt in receipts {
            self.world().delete(receipt, release);
        }
        Ok(())
    }

    /// Hides messages for `ticks` from now on, if they are still hidden.
    pub(super) fn hide(&self, receipts: &[Receipt], ticks: Tick) {
        let mut world = self.world();
        let clock = world.clock;
        for message in &mut world.queue.messages {
            let is_ours =
                message.deliveries.last().is_some_and(|last| receipts.contains(&last.receipt));
            if is_ours && message.hidden_until > clock {
                message.hidden_until = clock + ticks;
            }
        }
        world.arrivals += u64::from(ticks == 0);
    }
}
