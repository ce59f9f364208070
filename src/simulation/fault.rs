//! What breaks, and who comes and goes.

use super::queue::VISIBILITY;
use super::schedule::{self, Scheduler};
use super::seen::Seen;
use super::statements::log;
use super::world::{Who, World};
use crate::model::event::{Event, Position, Recorded};
use crate::model::signature::{LogIdentity, SigningKey};
use crate::queue;

/// Something that happens between two steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Crash,
    Terminate,
    Pause,
    StartWriter,
    StartRelay,
    StartPlay,
    StartBoot,
    StartRetire,
    Mend,
    RestartDatabase,
    LoseMessage,
    RepeatMessage,
    SwapMessages,
    ExpireVisibility,
    Purge,
    Foreign,
    Forge,
    SkipTime,
}

/// How often each of them, as against the others.
pub(super) const FAULTS: &[(Fault, u32)] = &[
    (Fault::Crash, 20),
    (Fault::Terminate, 4),
    (Fault::Pause, 12),
    (Fault::StartWriter, 8),
    (Fault::StartRelay, 10),
    (Fault::StartPlay, 20),
    (Fault::StartBoot, 14),
    (Fault::StartRetire, 14),
    (Fault::Mend, 5),
    (Fault::RestartDatabase, 3),
    (Fault::LoseMessage, 6),
    (Fault::RepeatMessage, 6),
    (Fault::SwapMessages, 4),
    (Fault::ExpireVisibility, 8),
    (Fault::Purge, 2),
    (Fault::Foreign, 3),
    (Fault::Forge, 6),
    (Fault::SkipTime, 6),
];

impl Scheduler<'_> {
    pub(super) fn apply(&mut self, fault: Fault) {
        let count =
            |scheduler: &Self, is: fn(&Who) -> bool| scheduler.slots.iter().filter(|slot| is(&slot.who)).count();
        match fault {
            Fault::Crash => self.crash(),
            Fault::Terminate => self.terminate(),
            Fault::Pause => self.pause(),
            Fault::StartWriter if count(self, |who| matches!(who, Who::Writer(_))) < 3 => self.start_writer(),
            Fault::StartRelay if count(self, |who| matches!(who, Who::Relay(_))) < 2 => self.start_relay(),
            Fault::StartPlay if count(self, |who| matches!(who, Who::Play(..))) < 2 => {
                let release = self.some_release();
                self.start_play(release);
            }
            Fault::StartBoot if count(self, |who| matches!(who, Who::Boot(..))) < 2 => {
                let release = self.some_release();
                self.start_boot(release);
            }
            // Two at once may tear down what was booted anew in between: see the module's doc.
            Fault::StartRetire if count(self, |who| matches!(who, Who::Retire(..))) < 1 => {
                let release = self.some_release();
                self.start_retire(release);
            }
            Fault::StartWriter | Fault::StartRelay | Fault::StartPlay | Fault::StartBoot | Fault::StartRetire => {}
            fault => self.disturb_world(fault),
        }
    }

    /// SIGKILL, at whatever it was about to do.
    fn crash(&mut self) {
        let Some(at) = self.some_slot(|who| !matches!(who, Who::Straggler(..))) else { return };
        let who = self.slots[at].who;
        let mut world = self.sim.world();
        world.note(|| format!("{who} is killed"));
        world.saw(match who {
            Who::Play(..) => Seen::CrashedPlay,
            Who::Boot(..) => Seen::CrashedBoot,
            Who::Relay(_) => Seen::CrashedRelay,
            Who::Retire(..) => Seen::CrashedRetire,
            Who::Writer(_) | Who::Straggler(..) | Who::Nobody => Seen::CrashedWriter,
        });
        drop(world);
        self.kill(|other| *other == who);
    }

    /// SIGTERM, with a batch in hand that takes too long: rolled back, its messages returned.
    fn terminate(&mut self) {
        let Some(at) = self.some_slot(|who| matches!(who, Who::Play(..))) else { return };
        let who = self.slots[at].who;
        self.slots.retain(|slot| slot.who != who && !slot.who.belongs_to(who));
        let mut world = self.sim.world();
        world.saw(Seen::Terminated);
        world.note(|| format!("{who} is terminated"));
        world.return_messages(who);
        drop(world);
        self.census();
    }

    fn pause(&mut self) {
        let Some(at) = self.some_slot(|who| !matches!(who, Who::Straggler(..))) else { return };
        let mut world = self.sim.world();
        let ticks = world.rng.u64(5..150);
        world.saw(Seen::Paused);
        let who = self.slots[at].who;
        for slot in self.slots.iter_mut().filter(|slot| slot.who == who || slot.who.belongs_to(who)) {
            slot.paused_until = world.clock + ticks;
        }
        world.note(|| format!("{who} gets no time for {ticks}"));
    }

    fn some_slot(&mut self, is: fn(&Who) -> bool) -> Option<usize> {
        let found: Vec<usize> = (0..self.slots.len()).filter(|&at| is(&self.slots[at].who)).collect();
        if found.is_empty() { None } else { Some(found[self.sim.world().rng.usize(0..found.len())]) }
    }

    fn disturb_world(&mut self, fault: Fault) {
        let mut guard = self.sim.world();
        let world = &mut *guard;
        let messages = world.queue.messages.len();
        match fault {
            Fault::Mend if !world.poison.is_empty() => {
                world.saw(Seen::Mended);
                let one = world.poison[world.rng.usize(0..world.poison.len())].actor;
                let mends_all = world.rng.bool();
                world.poison.retain(|poison| !mends_all && poison.actor != one);
            }
            Fault::RestartDatabase => {
                world.saw(Seen::DatabaseRestart);
                world.restart_database();
            }
            Fault::LoseMessage if messages > 0 => {
                world.saw(Seen::MessageLost);
                let at = world.rng.usize(0..messages);
                world.queue.messages.remove(at);
            }
            Fault::RepeatMessage if messages > 0 => {
                world.saw(Seen::MessageRepeated);
                let (from, to) = (world.rng.usize(0..messages), world.rng.usize(0..=messages));
                let (body, last) = (world.queue.messages[from].body.to_string(), world.queue.messages[from].last);
                world.enqueue(&body, last, None);
                world.queue.messages[to..].rotate_right(1);
            }
            Fault::SwapMessages if messages > 1 => {
                world.saw(Seen::Reordered);
                let (one, other) = (world.rng.usize(0..messages), world.rng.usize(0..messages));
                world.queue.messages.swap(one, other);
            }
            Fault::ExpireVisibility => {
                let clock = world.clock;
                let hidden: Vec<usize> =
                    (0..messages).filter(|&at| world.queue.messages[at].hidden_until > clock).collect();
                if !hidden.is_empty() {
                    world.saw(Seen::VisibilityExpired);
                    let at = hidden[world.rng.usize(0..hidden.len())];
                    world.queue.messages[at].hidden_until = clock;
                    world.arrivals += 1;
                }
            }
            Fault::Purge if messages > 0 => {
                world.saw(Seen::Purged);
                world.queue.messages.clear();
            }
            Fault::Foreign => {
                world.saw(Seen::Foreign);
                let bodies = [
                    "hello",
                    "{\"log\":\"another\",\"prev\":1,\"last\":2}",
                    "{\"log\":\"log-1\",\"prev\":0,\"events\":[]}",
                ];
                let body = bodies[world.rng.usize(0..bodies.len())];
                world.enqueue(body, None, None);
            }
            Fault::Forge if world.database.high_water > Position::START => {
                world.saw(Seen::Forged);
                let body = forgery(world);
                world.enqueue(&body, None, None);
                let to = world.rng.usize(0..=messages);
                world.queue.messages[to..].rotate_right(1);
            }
            Fault::SkipTime => world.clock += world.rng.u64(1..VISIBILITY * 2),
            _ => return,
        }
        world.note(|| format!("{fault:?}"));
    }
}

/// A message by somebody who has seen all that was sent, and wants other events to be applied: the log's id, its positions and
/// event ids, and payloads of his own.
fn forgery(world: &mut World) -> String {
    let last = world.rng.u64(1..=world.database.high_water.get());
    let prev = world.rng.u64(last.saturating_sub(4)..last);
    let forge = |position| {
        let event = world.database.committed(position)?;
        Some(Event::from(Recorded {
            position: event.position(),
            event_id: event.event_id().into(),
            stream_id: event.stream_id().into(),
            stream_version: event.stream_version(),
            event_type: event.event_type().into(),
            recorded_at: event.recorded_at(),
            payload: "\"forged\"".into(),
            metadata: None,
        }))
    };
    let events: Vec<Event> = (prev + 1..=last).filter_map(forge).collect();
    let guessed = LogIdentity { key: SigningKey::new(b"a key that was guessed"), ..log() };
    queue::pack(&guessed, Position::new(prev), &events, schedule::MESSAGE_BYTES, events.len()).body
}
