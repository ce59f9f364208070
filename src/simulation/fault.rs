//! Faults between the steps of a schedule: crashes, queue faults, and processes that start.

use super::occurrence::Occurrence;
use super::queue::VISIBILITY_TIMEOUT;
use super::schedule::{self, Scheduler};
use super::statements::log;
use super::world::{ProcessId, World};
use crate::model::event::{Event, Position, RecordedEvent};
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
    FixProjector,
    RestartDatabase,
    LoseMessage,
    RepeatMessage,
    SwapMessages,
    ExpireVisibility,
    PurgeQueue,
    SendForeignMessage,
    ForgeMessage,
    SkipTime,
}

/// The faults with their relative frequencies.
pub(super) const FAULTS: &[(Fault, u32)] = &[
    (Fault::Crash, 20),
    (Fault::Terminate, 4),
    (Fault::Pause, 12),
    (Fault::StartWriter, 8),
    (Fault::StartRelay, 10),
    (Fault::StartPlay, 20),
    (Fault::StartBoot, 14),
    (Fault::StartRetire, 14),
    (Fault::FixProjector, 5),
    (Fault::RestartDatabase, 3),
    (Fault::LoseMessage, 6),
    (Fault::RepeatMessage, 6),
    (Fault::SwapMessages, 4),
    (Fault::ExpireVisibility, 8),
    (Fault::PurgeQueue, 2),
    (Fault::SendForeignMessage, 3),
    (Fault::ForgeMessage, 6),
    (Fault::SkipTime, 6),
];

impl Scheduler<'_> {
    pub(super) fn apply(&mut self, fault: Fault) {
        let count = |scheduler: &Self, is: fn(&ProcessId) -> bool| {
            scheduler.slots.iter().filter(|slot| is(&slot.process_id)).count()
        };
        match fault {
            Fault::Crash => self.crash(),
            Fault::Terminate => self.terminate(),
            Fault::Pause => self.pause(),
            Fault::StartWriter
                if count(self, |process_id| matches!(process_id, ProcessId::Writer(_))) < 3 =>
            {
                self.start_writer()
            }
            Fault::StartRelay
                if count(self, |process_id| matches!(process_id, ProcessId::Relay(_))) < 2 =>
            {
                self.start_relay()
            }
            Fault::StartPlay
                if count(self, |process_id| matches!(process_id, ProcessId::Play(..))) < 2 =>
            {
                let release = self.random_release();
                self.start_play(release);
            }
            Fault::StartBoot
                if count(self, |process_id| matches!(process_id, ProcessId::Boot(..))) < 2 =>
            {
                let release = self.random_release();
                self.start_boot(release);
            }
            // One at a time: two retire commands of one projector are not modelled.
            Fault::StartRetire
                if count(self, |process_id| matches!(process_id, ProcessId::Retire(..))) < 1 =>
            {
                let release = self.random_release();
                self.start_retire(release);
            }
            Fault::StartWriter
            | Fault::StartRelay
            | Fault::StartPlay
            | Fault::StartBoot
            | Fault::StartRetire => {}
            fault => self.apply_to_world(fault),
        }
    }

    /// Kills a process at the point where it last yielded.
    fn crash(&mut self) {
        let Some(at) =
            self.random_slot(|process_id| !matches!(process_id, ProcessId::Straggler(..)))
        else {
            return;
        };
        let process_id = self.slots[at].process_id;
        let mut world = self.sim.world();
        world.trace(|| format!("{process_id} is killed"));
        world.record(match process_id {
            ProcessId::Play(..) => Occurrence::CrashedPlay,
            ProcessId::Boot(..) => Occurrence::CrashedBoot,
            ProcessId::Relay(_) => Occurrence::CrashedRelay,
            ProcessId::Retire(..) => Occurrence::CrashedRetire,
            ProcessId::Writer(_) | ProcessId::Straggler(..) | ProcessId::Scheduler => {
                Occurrence::CrashedWriter
            }
        });
        drop(world);
        self.kill(|other| *other == process_id);
    }

    /// Ends a worker whose batch in work exceeds the shutdown time: the batch is rolled back, and
    /// its messages return to the queue.
    fn terminate(&mut self) {
        let Some(at) = self.random_slot(|process_id| matches!(process_id, ProcessId::Play(..)))
        else {
            return;
        };
        let process_id = self.slots[at].process_id;
        self.slots.retain(|slot| {
            slot.process_id != process_id && !slot.process_id.belongs_to(process_id)
        });
        let mut world = self.sim.world();
        world.record(Occurrence::ProcessTerminated);
        world.trace(|| format!("{process_id} is terminated"));
        world.return_messages(process_id);
        drop(world);
        self.refresh_running();
    }

    fn pause(&mut self) {
        let Some(at) =
            self.random_slot(|process_id| !matches!(process_id, ProcessId::Straggler(..)))
        else {
            return;
        };
        let mut world = self.sim.world();
        let ticks = world.rng.u64(5..150);
        world.record(Occurrence::ProcessPaused);
        let process_id = self.slots[at].process_id;
        for slot in self
            .slots
            .iter_mut()
            .filter(|slot| slot.process_id == process_id || slot.process_id.belongs_to(process_id))
        {
            slot.paused_until = world.clock + ticks;
        }
        world.trace(|| format!("{process_id} is paused for {ticks} ticks"));
    }

    fn random_slot(&mut self, is: fn(&ProcessId) -> bool) -> Option<usize> {
        let found: Vec<usize> =
            (0..self.slots.len()).filter(|&at| is(&self.slots[at].process_id)).collect();
        if found.is_empty() {
            None
        } else {
            Some(found[self.sim.world().rng.usize(0..found.len())])
        }
    }

    fn apply_to_world(&mut self, fault: Fault) {
        let mut guard = self.sim.world();
        let world = &mut *guard;
        let messages = world.queue.messages.len();
        match fault {
            Fault::FixProjector if !world.poison.is_empty() => {
                world.record(Occurrence::ProjectorFixed);
                let one = world.poison[world.rng.usize(0..world.poison.len())].projector_index;
                let fixes_all = world.rng.bool();
                world.poison.retain(|poison| !fixes_all && poison.projector_index != one);
            }
            Fault::RestartDatabase => {
                world.record(Occurrence::DatabaseRestart);
                world.restart_database();
            }
            Fault::LoseMessage if messages > 0 => {
                world.record(Occurrence::MessageLost);
                let at = world.rng.usize(0..messages);
                world.queue.messages.remove(at);
            }
            Fault::RepeatMessage if messages > 0 => {
                world.record(Occurrence::MessageRepeated);
                let (from, to) = (world.rng.usize(0..messages), world.rng.usize(0..=messages));
                let (body, last) =
                    (world.queue.messages[from].body.to_string(), world.queue.messages[from].last);
                world.enqueue(&body, last, None);
                world.queue.messages[to..].rotate_right(1);
            }
            Fault::SwapMessages if messages > 1 => {
                world.record(Occurrence::MessagesReordered);
                let (one, other) = (world.rng.usize(0..messages), world.rng.usize(0..messages));
                world.queue.messages.swap(one, other);
            }
            Fault::ExpireVisibility => {
                let clock = world.clock;
                let hidden: Vec<usize> = (0..messages)
                    .filter(|&at| world.queue.messages[at].hidden_until > clock)
                    .collect();
                if !hidden.is_empty() {
                    world.record(Occurrence::VisibilityExpired);
                    let at = hidden[world.rng.usize(0..hidden.len())];
                    world.queue.messages[at].hidden_until = clock;
                    world.arrivals += 1;
                }
            }
            Fault::PurgeQueue if messages > 0 => {
                world.record(Occurrence::QueuePurged);
                world.queue.messages.clear();
            }
            Fault::SendForeignMessage => {
                world.record(Occurrence::ForeignMessage);
                let bodies = [
                    "hello",
                    "{\"log\":\"another\",\"prev\":1,\"last\":2}",
                    "{\"log\":\"log-1\",\"prev\":0,\"events\":[]}",
                ];
                let body = bodies[world.rng.usize(0..bodies.len())];
                world.enqueue(body, None, None);
            }
            Fault::ForgeMessage if world.database.high_water > Position::START => {
                world.record(Occurrence::ForgedMessage);
                let body = forge_message(world);
                world.enqueue(&body, None, None);
                let to = world.rng.usize(0..=messages);
                world.queue.messages[to..].rotate_right(1);
            }
            Fault::SkipTime => world.clock += world.rng.u64(1..VISIBILITY_TIMEOUT * 2),
            _ => return,
        }
        world.trace(|| format!("{fault:?}"));
    }
}

/// Builds a message as an attacker would who has seen every message but not the key: the log's id,
/// its positions and event ids, with forged payloads.
fn forge_message(world: &mut World) -> String {
    let last = world.rng.u64(1..=world.database.high_water.get());
    let prev = world.rng.u64(last.saturating_sub(4)..last);
    let forge = |position| {
        let event = world.database.committed(position)?;
        Some(Event::from(RecordedEvent {
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
