//! Mirrors `engine/relay.rs`: lease, mark, pack, send, record as published.

use super::Ended;
use super::high_water::raise_high_water;
use crate::engine::relay::deduplication_id;
use crate::model::event::Position;
use crate::queue;
use crate::simulation::bug::Bug;
use crate::simulation::occurrence::Occurrence;
use crate::simulation::queue::QueueError;
use crate::simulation::schedule;
use crate::simulation::statements::DatabaseError;
use crate::simulation::world::{Sim, Tick};

const LEASE_DURATION: Tick = 30;

/// The pause after a look at a log without new events.
const IDLE_PAUSE: Tick = 8;

struct Relay {
    sim: Sim,
    holder: u64,
    leased_at: Option<Tick>,
    max_events: usize,
}

/// The result of one look at the log.
enum RelayOutcome {
    Published { events: u64 },
    LeasedElsewhere,
}

enum RelayError {
    Database,
    Queue,
}

impl From<DatabaseError> for RelayError {
    fn from(_: DatabaseError) -> Self {
        RelayError::Database
    }
}

impl From<QueueError> for RelayError {
    fn from(_: QueueError) -> Self {
        RelayError::Queue
    }
}

/// Publishes until it is killed.
pub(in crate::simulation) async fn relay(sim: Sim) -> Ended {
    let holder = sim.world().rng.u64(..);
    let max_events = sim.world().rng.usize(1..=4);
    let mut relay = Relay { sim, holder, leased_at: None, max_events };
    loop {
        match relay.publish_new().await {
            Ok(RelayOutcome::Published { events: 0 }) => relay.sim.sleep(IDLE_PAUSE).await,
            Ok(RelayOutcome::Published { .. }) => {}
            Ok(RelayOutcome::LeasedElsewhere) => relay.sim.sleep(LEASE_DURATION / 5).await,
            Err(RelayError::Database | RelayError::Queue) => relay.sim.back_off().await,
        }
    }
}

impl Relay {
    async fn publish_new(&mut self) -> Result<RelayOutcome, RelayError> {
        let leased_at = match self.leased_at {
            Some(leased_at) if self.sim.now() - leased_at < LEASE_DURATION / 3 => leased_at,
            _ => {
                let requested_at = self.sim.now();
                self.leased_at = self
                    .sim
                    .lease_relay(self.holder, LEASE_DURATION)
                    .await?
                    .then_some(requested_at);
                let Some(leased_at) = self.leased_at else {
                    return Ok(RelayOutcome::LeasedElsewhere);
                };
                leased_at
            }
        };
        let mut mark = raise_high_water(&self.sim).await?.mark;
        if self.sim.has(Bug::PublishesPastTheMark) {
            mark = self.sim.last_visible().await?;
        }
        let marks = self.sim.marks().await?;
        let mut published = marks.published;
        while published < mark {
            let page = self.sim.read_after(published, mark, self.max_events as u64).await?;
            let mut rest = page.events.as_slice();
            while !rest.is_empty() {
                let packed = queue::pack(
                    &marks.log,
                    published,
                    rest,
                    schedule::MESSAGE_BYTES,
                    self.max_events,
                );
                let id = deduplication_id(&marks.log.id, published, packed.last);
                if !packed.body.contains("\"events\":[") {
                    self.sim.record(Occurrence::ReferenceSent);
                }
                self.publish(&packed.body, &id, packed.last).await?;
                published = packed.last;
                rest = &rest[packed.event_count..];
            }
            if self.sim.now() - leased_at > LEASE_DURATION / 2 {
                break;
            }
        }
        Ok(RelayOutcome::Published { events: published.since(marks.published) })
    }

    async fn publish(&self, body: &str, id: &str, last: Position) -> Result<(), RelayError> {
        if self.sim.world().database.lease.is_some_and(|(by, _)| by != self.holder) {
            self.sim.record(Occurrence::TwoRelays);
        }
        if self.sim.has(Bug::PublishedBeforeSent) {
            self.sim.set_published(last).await?;
        }
        self.sim.send(body, last, id).await?;
        Ok(self.sim.set_published(last).await?)
    }
}
