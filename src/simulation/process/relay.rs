//! The mirror of `relay.rs`: lease, mark, pack, send, note as published.

use super::Ended;
use super::high_water::raise_high_water;
use crate::engine::relay::deduplication_id;
use crate::model::event::Position;
use crate::queue;
use crate::simulation::bug::Bug;
use crate::simulation::queue::QueueError;
use crate::simulation::schedule;
use crate::simulation::seen::Seen;
use crate::simulation::statements::DatabaseError;
use crate::simulation::world::{Sim, Tick};

const LEASE: Tick = 30;

/// The pause between two looks at a log in which nothing is new.
const IDLE: Tick = 8;

struct Relay {
    sim: Sim,
    holder: u64,
    leased: Option<Tick>,
    max_events: usize,
}

/// What one look at the log came to.
enum Looked {
    Published { events: u64 },
    Elsewhere,
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
    let mut relay = Relay { sim, holder, leased: None, max_events };
    loop {
        match relay.look().await {
            Ok(Looked::Published { events: 0 }) => relay.sim.sleep(IDLE).await,
            Ok(Looked::Published { .. }) => {}
            Ok(Looked::Elsewhere) => relay.sim.sleep(LEASE / 5).await,
            Err(RelayError::Database | RelayError::Queue) => relay.sim.back_off().await,
        }
    }
}

impl Relay {
    async fn look(&mut self) -> Result<Looked, RelayError> {
        let leased = match self.leased {
            Some(leased) if self.sim.now() - leased < LEASE / 3 => leased,
            _ => {
                let asked = self.sim.now();
                self.leased = self.sim.lease_relay(self.holder, LEASE).await?.then_some(asked);
                let Some(leased) = self.leased else { return Ok(Looked::Elsewhere) };
                leased
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
                let packed = queue::pack(&marks.log, published, rest, schedule::MESSAGE_BYTES, self.max_events);
                let id = deduplication_id(&marks.log.id, published, packed.last);
                if !packed.body.contains("\"events\":[") {
                    self.sim.saw(Seen::Reference);
                }
                self.publish(&packed.body, &id, packed.last).await?;
                published = packed.last;
                rest = &rest[packed.events..];
            }
            if self.sim.now() - leased > LEASE / 2 {
                break;
            }
        }
        Ok(Looked::Published { events: published.since(marks.published) })
    }

    async fn publish(&self, body: &str, id: &str, last: Position) -> Result<(), RelayError> {
        if self.sim.world().database.lease.is_some_and(|(by, _)| by != self.holder) {
            self.sim.saw(Seen::TwoRelays);
        }
        if self.sim.has(Bug::PublishedBeforeSent) {
            self.sim.set_published(last).await?;
        }
        self.sim.send(body, last, id).await?;
        Ok(self.sim.set_published(last).await?)
    }
}
