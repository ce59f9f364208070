//! The simulated projectors, and the releases with some of them each.

use std::sync::OnceLock;

use crate::model::event::Event;
use crate::model::projector::{EventTypes, Mode, Projector, ProjectorId};
use crate::model::registry::Registry;

/// The event types. Half of the projectors subscribe only to the second.
pub(super) const TYPES: [&str; 2] = ["Opened", "Closed"];

/// A projector as the engine sees it. The simulation applies its events.
#[derive(Debug, Clone, Copy)]
pub(super) struct SimProjector {
    pub(super) name: &'static str,
    pub(super) version: u32,
    pub(super) mode: Mode,
    pub(super) only_closed: bool,
    pub(super) side_effects: bool,
    /// Differs between releases that define the projector differently.
    revision: &'static str,
}

const fn sim_projector(
    name: &'static str,
    version: u32,
    mode: Mode,
    only_closed: bool,
    side_effects: bool,
) -> SimProjector {
    SimProjector { name, version, mode, only_closed, side_effects, revision: "" }
}

pub(super) const PROJECTORS: [SimProjector; 6] = [
    sim_projector("all", 1, Mode::FromBeginning, false, false),
    sim_projector("closed", 1, Mode::FromBeginning, true, false),
    sim_projector("mails", 1, Mode::FromNow, false, true),
    sim_projector("closed", 2, Mode::FromBeginning, true, false),
    sim_projector("import", 1, Mode::Once, false, false),
    sim_projector("recent", 1, Mode::FromNow, true, false),
];

/// The projectors of each release, as indexes into `PROJECTORS`, in the order of its registry.
const RELEASES: [&[usize]; 3] = [&[0, 1, 2], &[0, 3, 2, 4], &[5, 3, 0, 4]];

/// Projectors that a release defines differently than the releases before it.
const REDEFINED: &[(Release, usize)] = &[(2, 0)];

/// A release by its index. Rolling back means deploying a lower one.
pub(super) type Release = usize;

pub(super) const RELEASE_COUNT: usize = RELEASES.len();

#[crate::async_trait]
impl Projector for SimProjector {
    fn name(&self) -> &str {
        self.name
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn mode(&self) -> Mode {
        self.mode
    }

    fn event_types(&self) -> EventTypes {
        if self.only_closed { EventTypes::only([TYPES[1]]) } else { EventTypes::All }
    }

    fn has_side_effects(&self) -> bool {
        self.side_effects
    }

    fn revision(&self) -> String {
        self.revision.into()
    }

    async fn handle(&self, _: &Event, _: &mut sqlx::MySqlConnection) -> anyhow::Result<()> {
        unreachable!("the simulation does not call `handle`")
    }
}

/// The registries of all releases.
pub(super) fn releases() -> Vec<Registry> {
    let registry = |release: Release| {
        let mut registry = Registry::new();
        for &projector_index in RELEASES[release] {
            registry
                .add(define(release, projector_index))
                .expect("names and versions are distinct");
        }
        registry
    };
    (0..RELEASE_COUNT).map(registry).collect()
}

fn define(release: Release, projector_index: usize) -> SimProjector {
    let revision = if REDEFINED.contains(&(release, projector_index)) { "2" } else { "" };
    SimProjector { revision, ..PROJECTORS[projector_index] }
}

/// The digest of a projector as a release defines it.
pub(super) fn digest(release: Release, projector_index: usize) -> &'static str {
    static DIGESTS: OnceLock<Vec<Vec<String>>> = OnceLock::new();
    let digest = |release, projector_index| {
        let registry = Registry::new()
            .with(define(release, projector_index))
            .expect("the definition is valid");
        registry.iter().next().expect("the registry has one projector").digest.clone()
    };
    let all = || {
        let of_release = |release| {
            (0..PROJECTORS.len()).map(|projector_index| digest(release, projector_index)).collect()
        };
        (0..RELEASE_COUNT).map(of_release).collect()
    };
    &DIGESTS.get_or_init(all)[release][projector_index]
}

/// The index of a projector in `PROJECTORS`.
pub(super) fn index_of(id: &ProjectorId) -> usize {
    let found = PROJECTORS
        .iter()
        .position(|projector| projector.name == id.name && projector.version == id.version);
    found.expect("every projector is in `PROJECTORS`")
}

/// Whether a release has this projector.
pub(super) fn is_in_release(release: Release, projector_index: usize) -> bool {
    RELEASES[release].contains(&projector_index)
}

/// Whether a projector subscribes to an event. The invariants use this instead of the engine's own
/// code.
pub(super) fn wants(projector_index: usize, event: &Event) -> bool {
    if PROJECTORS[projector_index].only_closed {
        event.event_type() == TYPES[1]
    } else {
        TYPES.contains(&event.event_type())
    }
}
