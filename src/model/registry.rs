//! The projectors of one release.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use futures_util::future::join_all;
use ring::digest::{Context, SHA256};

use crate::model::event::Event;
use crate::model::external::{Delivery, ExternalHandler};
use crate::model::projector::{EventTypes, Mode, Projector, ProjectorId, SessionUse};

/// The projectors of one release, in the order in which they receive each event.
#[derive(Clone, Default)]
pub struct Registry {
    projectors: Vec<Arc<RegisteredProjector>>,
    /// The index of each projector in `projectors`.
    indexes: HashMap<ProjectorId, usize>,
    release: Option<String>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<String> = self.iter().map(|registered| registered.id.to_string()).collect();
        f.debug_struct("Registry")
            .field("projectors", &ids)
            .field("release", &self.release)
            .finish()
    }
}

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a projector at the end.
    ///
    /// # Errors
    /// If the name is not 1 to 100 characters of `A-Z a-z 0-9 _ . -`, if the version is 0, or if
    /// the registry already has a projector with that name and version.
    pub fn add(&mut self, projector: impl Projector) -> Result<(), RegistryError> {
        self.register(RegisteredProjector::new(Arc::new(projector))?)
    }

    /// [`Registry::add`] for a projector whose events a process applies.
    pub(crate) fn add_external(
        &mut self,
        projector: impl Projector,
        handler: Arc<dyn ExternalHandler>,
    ) -> Result<(), RegistryError> {
        let registered = RegisteredProjector::new(Arc::new(projector))?;
        self.register(RegisteredProjector { external: Some(handler), ..registered })
    }

    fn register(&mut self, registered: RegisteredProjector) -> Result<(), RegistryError> {
        if self.get(&registered.id).is_some() {
            return Err(RegistryError::Duplicate(registered.id));
        }
        self.indexes.insert(registered.id.clone(), self.projectors.len());
        self.projectors.push(Arc::new(registered));
        Ok(())
    }

    /// [`Registry::add`] for a chain of calls in `main`.
    ///
    /// # Errors
    /// Those of [`Registry::add`].
    pub fn with(mut self, projector: impl Projector) -> Result<Self, RegistryError> {
        self.add(projector)?;
        Ok(self)
    }

    /// Sets the name of the release: a version, a commit or the tag of an image. Failures in the
    /// ledger and the log show it.
    pub fn set_release(&mut self, release: impl Into<String>) {
        self.release = Some(release.into());
    }

    /// The name of the release; `None` if it was not set.
    pub fn release(&self) -> Option<&str> {
        self.release.as_deref()
    }

    /// The projector with that name and version.
    pub(crate) fn get(&self, id: &ProjectorId) -> Option<&Arc<RegisteredProjector>> {
        self.indexes.get(id).map(|index| &self.projectors[*index])
    }

    /// All projectors, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<RegisteredProjector>> {
        self.projectors.iter()
    }

    /// How many projectors need a database session of their own.
    pub(crate) fn dedicated_session_count(&self) -> u32 {
        self.iter().filter(|projector| projector.session == SessionUse::Dedicated).count() as u32
    }

    /// Stops the processes of all projectors. The next batch of a projector starts its process
    /// again.
    pub(crate) async fn stop_processes(&self) {
        let stops = self.iter().filter_map(|projector| projector.external.as_ref());
        join_all(stops.map(|handler| handler.stop())).await;
    }

    /// Whether the registry is empty.
    pub fn is_empty(&self) -> bool {
        self.projectors.is_empty()
    }

    /// The number of projectors.
    pub fn len(&self) -> usize {
        self.projectors.len()
    }
}

/// A projector and its settings, which are read once.
pub(crate) struct RegisteredProjector {
    pub(crate) id: ProjectorId,
    pub(crate) mode: Mode,
    pub(crate) has_side_effects: bool,
    pub(crate) session: SessionUse,
    /// The most events that one transaction applies, at least 1.
    pub(crate) max_batch: usize,
    /// The tables that the projector declares as its own.
    pub(crate) tables: Vec<String>,
    /// SHA-256 of its definition, in hexadecimal.
    pub(crate) digest: String,
    pub(crate) projector: Arc<dyn Projector>,
    /// The process that applies the events, if the projector has one.
    pub(crate) external: Option<Arc<dyn ExternalHandler>>,
    /// The subscribed event types; `None` means every event.
    event_types: Option<HashSet<String>>,
}

impl RegisteredProjector {
    fn new(projector: Arc<dyn Projector>) -> Result<Self, RegistryError> {
        let id = ProjectorId { name: projector.name().to_owned(), version: projector.version() };
        let is_allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-');
        if id.name.is_empty() || id.name.len() > 100 || !id.name.bytes().all(is_allowed) {
            return Err(RegistryError::InvalidName(id.name));
        }
        if id.version == 0 {
            return Err(RegistryError::InvalidVersion(id.name));
        }
        let event_types = match projector.event_types() {
            EventTypes::All => None,
            EventTypes::Only(types) => Some(types.into_iter().collect()),
        };
        let (mode, has_side_effects) = (projector.mode(), projector.has_side_effects());
        let digest = definition_digest(projector.as_ref(), &projector.event_types());
        let (session, tables) = (projector.session(), projector.tables());
        // With several events in one transaction, a failure would repeat the outside effects of the
        // earlier events. It would also expose an event to the session state that earlier events
        // left.
        let needs_transaction_per_event = has_side_effects || session == SessionUse::PerEvent;
        let max_batch = if needs_transaction_per_event { 1 } else { projector.max_batch().max(1) };
        Ok(RegisteredProjector {
            id,
            mode,
            has_side_effects,
            session,
            max_batch,
            tables,
            digest,
            projector,
            external: None,
            event_types,
        })
    }

    /// The process that applies each event exactly once, in a transaction of its own.
    pub(crate) fn fenced_handler(&self) -> Option<&dyn ExternalHandler> {
        let handler = self.external.as_deref()?;
        (handler.delivery() == Delivery::ExactlyOnce).then_some(handler)
    }

    /// The subscribed event types; `None` means every event.
    pub(crate) fn event_types(&self) -> Option<&HashSet<String>> {
        self.event_types.as_ref()
    }

    /// Whether each event needs its own transaction.
    pub(crate) fn needs_transaction_per_event(&self) -> bool {
        self.max_batch == 1
    }

    /// The event types as the ledger stores them: sorted, and `["*"]` for all.
    pub(crate) fn subscription(&self) -> Vec<String> {
        let Some(event_types) = &self.event_types else { return vec!["*".to_owned()] };
        sorted_types(&EventTypes::only(event_types))
    }

    /// Whether the projector receives this event. No projector receives gap fillers.
    pub(crate) fn subscribes_to(&self, event: &Event) -> bool {
        !event.is_filler() && self.event_types.as_ref().is_none_or(|types| event.may_match(types))
    }
}

/// The event types in order, each once; `["*"]` means all.
pub(crate) fn sorted_types(event_types: &EventTypes) -> Vec<String> {
    let EventTypes::Only(types) = event_types else { return vec!["*".to_owned()] };
    let mut types = types.clone();
    types.sort_unstable();
    types.dedup();
    types
}

/// The digest of a projector's definition with these event types.
pub(crate) fn definition_digest(projector: &dyn Projector, event_types: &EventTypes) -> String {
    let id = ProjectorId { name: projector.name().to_owned(), version: projector.version() };
    let event_types: Option<HashSet<String>> = match event_types {
        EventTypes::All => None,
        EventTypes::Only(types) => Some(types.iter().cloned().collect()),
    };
    let (mode, has_side_effects) = (projector.mode(), projector.has_side_effects());
    digest(&id, mode, has_side_effects, event_types.as_ref(), &projector.revision())
}

/// The SHA-256 of a definition, in hexadecimal. The length of each part precedes it, so that two
/// different definitions cannot have the same input.
fn digest(
    id: &ProjectorId,
    mode: Mode,
    has_side_effects: bool,
    event_types: Option<&HashSet<String>>,
    revision: &str,
) -> String {
    let mut types: Vec<&str> =
        event_types.map_or_else(|| vec!["*"], |types| types.iter().map(String::as_str).collect());
    types.sort_unstable();
    let effects = if has_side_effects { "side effects" } else { "none" };
    let version = id.version.to_string();
    let parts = [id.name.as_str(), version.as_str(), mode.as_str(), effects, revision]
        .into_iter()
        .chain(types);
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part.as_bytes());
    }
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The reason for which a projector cannot be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The name is empty, too long, or has a character that is not allowed.
    #[error("projector name {0:?} must be 1 to 100 characters of A-Z a-z 0-9 _ . -")]
    InvalidName(String),
    /// The version is 0.
    #[error("projector {0}: the version must be at least 1")]
    InvalidVersion(String),
    /// Another projector of the registry has that name and version.
    #[error("projector {0} is registered twice; give one of them another name or version")]
    Duplicate(ProjectorId),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_changes_with_every_part_of_the_definition() {
        let id = |name: &str| ProjectorId { name: name.into(), version: 1 };
        let types = |types: &[&str]| {
            Some(types.iter().map(|&name| name.to_owned()).collect::<HashSet<_>>())
        };
        let of =
            |name: &str, mode, effects, event_types: Option<HashSet<String>>, revision: &str| {
                digest(&id(name), mode, effects, event_types.as_ref(), revision)
            };
        let all = [
            of("a", Mode::FromBeginning, false, None, ""),
            of("b", Mode::FromBeginning, false, None, ""),
            of("a", Mode::FromNow, false, None, ""),
            of("a", Mode::FromBeginning, true, None, ""),
            of("a", Mode::FromBeginning, false, types(&["x"]), ""),
            of("a", Mode::FromBeginning, false, types(&["x", "y"]), ""),
            of("a", Mode::FromBeginning, false, types(&["xy"]), ""),
            of("a", Mode::FromBeginning, false, None, "2"),
        ];
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        let (one, other) = (types(&["x", "y"]), types(&["y", "x"]));
        let digest = |event_types| of("a", Mode::FromBeginning, false, event_types, "");
        assert_eq!(digest(one), digest(other), "the order of the types does not matter");
        assert!(all[0].len() == 64 && all[0].bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
}
