//! The digest of a file's content.

use ring::digest::{Context, SHA256};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::command::{COMMAND_KEYS, DEFINING_KEYS};
use super::file::{KEYS, ON_KEYS};

/// The SHA-256 of a file's content, except name and version. Comments, blanks and the order of keys
/// do not count.
pub(super) fn revision(table: &DeTable<'_>) -> String {
    let mut context = Context::new(&SHA256);
    let keys = KEYS.iter().chain(&COMMAND_KEYS[..DEFINING_KEYS]);
    for key in keys.filter(|key| **key != "name" && **key != "version") {
        // A key with its default value counts as a missing key.
        let is_default = |value: &DeValue<'_>| match value {
            DeValue::Boolean(value) => !value,
            DeValue::Array(entries) => entries.is_empty(),
            _ => false,
        };
        if let Some(value) =
            table.get(*key).map(Spanned::get_ref).filter(|value| !is_default(value))
        {
            hash(key, &mut context);
            hash_value(value, &mut context);
        }
    }
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Adds a part to the hash. Its length precedes it, so that two different definitions cannot have
/// the same input.
fn hash(part: &str, context: &mut Context) {
    context.update(&(part.len() as u64).to_be_bytes());
    context.update(part.as_bytes());
}

fn hash_value(value: &DeValue<'_>, context: &mut Context) {
    hash(value.type_str(), context);
    match value {
        DeValue::Array(entries) => {
            context.update(&(entries.len() as u64).to_be_bytes());
            entries.iter().for_each(|entry| hash_value(entry.get_ref(), context));
        }
        DeValue::Table(table) => {
            // How a statement is sent does not change its effect.
            for key in ON_KEYS.iter().filter(|key| **key != "batch") {
                hash(key, context);
                table.get(*key).into_iter().for_each(|value| hash_value(value.get_ref(), context));
            }
        }
        DeValue::String(text) => hash(text.replace("\r\n", "\n").trim(), context),
        other => hash(&format!("{other:?}"), context),
    }
}
