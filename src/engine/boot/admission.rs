//! The checks and preparations before the replay: definitions, tables and setups. Boot holds the
//! [`SetupLock`] during all of them.

use std::pin::pin;

use anyhow::anyhow;
use tracing::{info, warn};

use super::{Boot, start_position};
use crate::database::error::{format_chain, has_denied_cause, has_transient_cause, is_denied};
use crate::engine::apply;
use crate::engine::catch_up::{Cursor, CursorState};
use crate::engine::error::Error;
use crate::engine::retry::{ApplyOutcome, ProjectorError};
use crate::ledger::Entry;
use crate::ledger::read_model::{self, SetupLock, TableCatalog};
use crate::model::event::Position;
use crate::model::lifecycle::{Stage, Status};
use crate::model::metrics;
use crate::model::projector::Mode;
use crate::model::registry::RegisteredProjector;
use crate::model::wait_log::log_wait;
use crate::store::AddedTypes;

impl Boot<'_> {
    /// Checks every projector, registers the new ones, runs the setups, and returns a cursor for
    /// each projector that will be replayed.
    pub(super) async fn admit(&mut self, before: &[Entry]) -> Result<Vec<Cursor>, Error> {
        let (database, retry_timeout) =
            (self.engine.database.clone(), self.engine.limits.retry_timeout);
        let take = || SetupLock::acquire(&database, retry_timeout);
        let Some(mut lock) = self.engine.retry_transient("acquire the setup lock", take).await?
        else {
            self.findings.reason = Some(
                "another boot is still running setups, and this boot's wait timeout has passed; \
                 see the log of the other boot, then run boot again"
                    .into(),
            );
            return Ok(Vec::new());
        };
        let admitted = lock.run_while_held(self.admit_locked(before)).await;
        lock.release(&database).await;
        admitted
    }

    async fn admit_locked(&mut self, before: &[Entry]) -> Result<Vec<Cursor>, Error> {
        for id in &self.accept {
            self.engine
                .retry_transient("accept a projector", || {
                    self.engine.ledger.clear_rebuild_reason(id)
                })
                .await?;
        }
        let entries = self.entries().await?;
        let mut tables = self.read_tables(&entries).await?;
        let mut new = Vec::new();
        for projector in self.selected.clone() {
            match entries.iter().find(|entry| entry.id == projector.id) {
                Some(entry) => self.check_existing(&projector, entry, before, &tables).await?,
                None => {
                    self.refuse_nonempty_tables(&projector, &tables).await?;
                    new.push(projector);
                }
            }
        }
        if !self.findings.is_stopped && !new.is_empty() {
            let high_water = self.raise_high_water().await?.mark;
            for projector in &new {
                let position = start_position(projector.mode, high_water);
                let register = || self.engine.ledger.register(projector, position);
                self.engine.retry_transient("register a projector", register).await?;
            }
        }
        let mut cursors = self.cursors(before).await?;
        self.stall(&mut cursors).await?;
        for cursor in &mut cursors {
            if cursor.is_running() && (cursor.was_broken || !self.findings.is_stopped) {
                self.set_up(cursor, &mut tables).await?;
                self.findings.is_stopped |= cursor.should_stop_boot();
            }
        }
        self.stall(&mut cursors).await?;
        Ok(cursors)
    }

    /// Creates a cursor for each selected projector that boot can apply events to.
    async fn cursors(&self, before: &[Entry]) -> Result<Vec<Cursor>, Error> {
        let mut cursors = Vec::new();
        for entry in self.entries().await? {
            let Some(projector) = self.selected.iter().find(|projector| projector.id == entry.id)
            else {
                continue;
            };
            if self.findings.refused.contains_key(&entry.id) {
                continue;
            }
            if Stage::Boot.can_apply(&entry.status) {
                info!(
                    projector = %entry.id, mode = %entry.mode, status = %entry.status,
                    position = entry.position.get(), release = self.engine.release,
                    "booting"
                );
                self.engine.resume_retry(&entry);
                let mut cursor = Cursor::new(projector, entry.position);
                cursor.was_broken = was_broken(before, &entry);
                cursors.push(cursor);
            } else if entry.status == Status::Retired {
                warn!(
                    projector = %entry.id, status = %entry.status,
                    "retired, and never played again: remove it from the set, or give it a new \
                     version"
                );
            }
        }
        Ok(cursors)
    }

    /// Checks a projector that the ledger already has.
    async fn check_existing(
        &mut self,
        projector: &RegisteredProjector,
        entry: &Entry,
        before: &[Entry],
        tables: &TableCatalog,
    ) -> Result<(), Error> {
        if entry.status == Status::Retired {
            return Ok(());
        }
        if let Some(reason) = &entry.rebuild_reason {
            self.findings.is_stopped |= !was_broken(before, entry);
            let has_hint = reason.contains("projectionist retire");
            let reason = if has_hint {
                reason.clone()
            } else {
                format!("{reason}; {}", rebuild_hint(projector))
            };
            self.findings.refused.insert(projector.id.clone(), reason);
            return Ok(());
        }
        self.compare_definition(projector, entry).await?;
        if entry.status != Status::Live || self.is_accepted(projector) {
            return Ok(());
        }
        // Rows from before the ledger recorded tables: a projector owns the tables that it names.
        let owned = entry.owned_tables.as_deref().unwrap_or(&projector.tables);
        if let Some(table) = owned.iter().find(|table| !tables.contains(table)) {
            let reason = format!(
                "its table {table} is missing, and with it the events applied so far; {}",
                rebuild_hint(projector)
            );
            self.mark_broken_for_rebuild(projector, &reason).await;
            self.findings.is_stopped = true;
            self.findings.refused.insert(projector.id.clone(), reason);
        } else if let Some(table) = projector.tables.iter().find(|table| !tables.contains(table)) {
            self.findings.is_stopped = true;
            self.findings.refused.insert(
                projector.id.clone(),
                format!(
                    "it is live, but its table {table} does not exist, and the setup of a live \
                     projector is not run again. Give it a new version, or create the table"
                ),
            );
        }
        Ok(())
    }

    /// Whether an operator has accepted this projector despite boot's objections (`--accept`).
    fn is_accepted(&self, projector: &RegisteredProjector) -> bool {
        self.accept.contains(&projector.id)
    }

    /// Compares the definition with that of the last boot. Refuses a definition that subscribes to
    /// added event types if the projector has passed events of these types.
    async fn compare_definition(
        &mut self,
        projector: &RegisteredProjector,
        entry: &Entry,
    ) -> Result<(), Error> {
        let id = &projector.id;
        if entry.matches_digest(&projector.digest) {
            return Ok(());
        }
        info!(
            projector = %id, status = %entry.status, release = self.engine.release,
            "changed since it was booted"
        );
        self.findings.changed.insert(id.clone());
        let Some(added) = added_types(entry.event_types.as_deref(), projector)
            .filter(|_| !self.is_accepted(projector))
        else {
            return Ok(());
        };
        let began_at = match entry.mode {
            Mode::FromNow => entry.start_position.unwrap_or(Position::START),
            Mode::FromBeginning | Mode::Once => Position::START,
        };
        let count = || self.engine.store.count_added(&added, began_at, entry.position);
        let passed = self.engine.retry_transient("count the events of added types", count).await?;
        if passed > 0 {
            self.findings.is_stopped = true;
            self.findings.refused.insert(
                id.clone(),
                format!(
                    "it subscribes to more event types than at its last boot, and has passed \
                     {passed} events of these types, up to position {}. It would never receive \
                     them. Give it a new version, or boot with --accept {id} if it does not need \
                     them",
                    entry.position
                ),
            );
        }
        Ok(())
    }

    /// Refuses a new projector if one of its tables has rows.
    async fn refuse_nonempty_tables(
        &mut self,
        projector: &RegisteredProjector,
        tables: &TableCatalog,
    ) -> Result<(), Error> {
        if self.is_accepted(projector) {
            return Ok(());
        }
        for table in projector.tables.iter().filter(|table| tables.contains(table)) {
            let read = || read_model::has_rows(&self.engine.database, table);
            let found = match self.engine.retry_transient("check a table for rows", read).await {
                Ok(false) => continue,
                Ok(true) => "exists already and has rows",
                // Without the privilege to read the table, boot cannot know whether it is empty.
                Err(error) if is_denied(&error) => {
                    "exists already, and this database user has no SELECT privilege to check \
                     whether it is empty"
                }
                Err(error) => return Err(error.into()),
            };
            let id = &projector.id;
            self.findings.is_stopped = true;
            self.findings.refused.insert(
                id.clone(),
                format!(
                    "it is new, but its table {table} {found}: the replay would add to existing \
                     rows. Drop or empty the table, or give the projector another table. If the \
                     rows belong there, boot with --accept {id}"
                ),
            );
            return Ok(());
        }
        Ok(())
    }

    /// Runs a projector's setup and records the tables that the projector owns. Marks the projector
    /// broken if it is past its start and one of its tables is missing or was just created: such a
    /// table lacks the events applied so far.
    async fn set_up(
        &mut self,
        cursor: &mut Cursor,
        tables: &mut TableCatalog,
    ) -> Result<(), Error> {
        let projector = cursor.projector.clone();
        let id = &projector.id;
        let read =
            self.engine.retry_transient("read the ledger", || self.engine.ledger.entry(id)).await?;
        let Some(entry) = read.filter(|entry| Stage::Boot.can_apply(&entry.status)) else {
            cursor.state = CursorState::TakenOver;
            return Ok(());
        };
        self.record_definition(&projector, &entry).await?;
        let must_be_whole = entry.is_past_start() && !self.is_accepted(&projector);
        if let Some(table) = missing_table(&entry, &projector, tables).filter(|_| must_be_whole) {
            let reason =
                format!("its table {table} is missing, and with it the events applied so far");
            let reason = format!("{reason}; {}", rebuild_hint(&projector));
            cursor.record(self.mark_broken_for_rebuild(&projector, &reason).await);
            self.findings.refused.insert(id.clone(), reason);
            return Ok(());
        }
        let set_up = || apply::set_up(&self.engine.database, &projector);
        let setting_up = pin!(self.engine.retry_transient("run a setup", set_up));
        let done = log_wait(&format!("the setup of {id}"), setting_up).await;
        let read = || tables.reload(&self.engine.database);
        let after = self.engine.retry_transient("read the tables", read).await?;
        let before = std::mem::replace(tables, after);
        let created = tables.created_since(&before);
        if let Some(table) = created.first().filter(|_| must_be_whole) {
            let reason = format!(
                "its setup has just created the table {table}, which lacks the events applied so \
                 far"
            );
            let reason = format!("{reason}; {}", rebuild_hint(&projector));
            cursor.record(self.mark_broken_for_rebuild(&projector, &reason).await);
            self.findings.refused.insert(id.clone(), reason);
            return Ok(());
        }
        self.record_tables(&projector, &entry, created, tables).await?;
        if let Err(error) = done {
            metrics::record_failure(id);
            let error = error.context("setup failed");
            let outcome = if has_transient_cause(&error) || has_denied_cause(&error) {
                ApplyOutcome::GaveUp(format_chain(&error))
            } else {
                let failed = ProjectorError::new(error, 1);
                self.engine.mark_broken(&projector, Stage::Boot, None, failed).await
            };
            cursor.record(outcome);
        }
        Ok(())
    }

    /// Marks a projector broken if it is live or in boot, so that no process continues it. The
    /// status is checked under the row's lock.
    async fn mark_broken_for_rebuild(
        &self,
        projector: &RegisteredProjector,
        reason: &str,
    ) -> ApplyOutcome {
        let may_be_broken = |entry: &Entry| {
            Stage::Boot.can_apply(&entry.status) || Stage::Play.can_apply(&entry.status)
        };
        let failed = ProjectorError::for_rebuild(anyhow!("rebuild: {reason}"), 1);
        self.engine.mark_broken_if(projector, Stage::Boot, None, failed, may_be_broken).await
    }

    /// Records the definition with which a projector is booted.
    pub(super) async fn record_definition(
        &self,
        projector: &RegisteredProjector,
        entry: &Entry,
    ) -> Result<(), Error> {
        if entry.digest.as_ref() != Some(&projector.digest) {
            let record = || self.engine.ledger.set_definition(projector, entry.digest.as_deref());
            self.engine.retry_transient("record a definition", record).await?;
        }
        Ok(())
    }

    /// Records the tables that a projector owns: the existing ones among those that it owned
    /// before, names or has just created.
    pub(super) async fn record_tables(
        &self,
        projector: &RegisteredProjector,
        entry: &Entry,
        created: Vec<String>,
        tables: &TableCatalog,
    ) -> Result<(), Error> {
        let mut owned: Vec<String> = own_tables(entry, projector, tables).chain(created).collect();
        owned.retain(|table| tables.contains(table));
        owned.sort_unstable();
        owned.dedup();
        if entry.owned_tables.as_ref() != Some(&owned) {
            let record = || self.engine.ledger.set_owned_tables(&projector.id, &owned);
            self.engine.retry_transient("record a projector's tables", record).await?;
        }
        Ok(())
    }

    /// Reads the tables of this database and of every other database in which a projector has a
    /// table.
    pub(super) async fn read_tables(&self, entries: &[Entry]) -> Result<TableCatalog, sqlx::Error> {
        let read = || {
            let owned = entries.iter().filter_map(|entry| entry.owned_tables.as_ref()).flatten();
            let named = self.selected.iter().flat_map(|projector| &projector.tables);
            TableCatalog::read(&self.engine.database, owned.chain(named))
        };
        self.engine.retry_transient("read the tables", read).await
    }
}

/// Whether a projector was broken when boot began.
fn was_broken(before: &[Entry], entry: &Entry) -> bool {
    before.iter().any(|before| before.id == entry.id && before.status.failure().is_some())
}

fn own_tables<'a>(
    entry: &'a Entry,
    projector: &'a RegisteredProjector,
    tables: &'a TableCatalog,
) -> impl Iterator<Item = String> + 'a {
    let owned = entry.owned_tables.iter().flatten();
    owned.chain(&projector.tables).map(|table| tables.canonical_name(table))
}

/// The first missing table among those that a projector owns or names.
fn missing_table(
    entry: &Entry,
    projector: &RegisteredProjector,
    tables: &TableCatalog,
) -> Option<String> {
    own_tables(entry, projector, tables).find(|table| !tables.contains(table))
}

fn rebuild_hint(projector: &RegisteredProjector) -> String {
    let id = &projector.id;
    format!(
        "it must be rebuilt: retire it (projectionist retire {id} --force) and run boot again, or \
         give it a new version; if the table was restored with its contents, boot with --accept \
         {id}"
    )
}

/// The event types that were added to a subscription since the last boot. `None` if no type was
/// added, or if the previous subscription is unknown.
fn added_types(before: Option<&[String]>, projector: &RegisteredProjector) -> Option<AddedTypes> {
    let (before, now) = (before?, projector.subscription());
    if before.iter().any(|of| of == "*") {
        return None;
    }
    if projector.event_types().is_none() {
        return Some(AddedTypes::AllExcept(before.to_vec()));
    }
    let added: Vec<String> = now.into_iter().filter(|of| !before.contains(of)).collect();
    (!added.is_empty()).then_some(AddedTypes::Only(added))
}
