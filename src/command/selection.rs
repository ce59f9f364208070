//! Finds the projectors that a command line names.

use crate::engine::error::Error;
use crate::model::projector::ProjectorId;
use crate::model::spelling::nearest;

/// The most known projectors that an error lists.
const MAX_LISTED: usize = 10;

/// Returns the ids among `known` that `text` names: `NAME` stands for every version, and
/// `NAME@VERSION` for one. `place` contains the known projectors: "this set", "the ledger".
///
/// # Errors
/// [`Error::Input`] if no projector has the name, or if the version is not a number.
pub(super) fn find<'i>(
    text: &str,
    known: impl IntoIterator<Item = &'i ProjectorId>,
    place: &str,
) -> Result<Vec<&'i ProjectorId>, Error> {
    let (name, version) = match text.split_once('@') {
        None => (text, None),
        Some((name, version)) => match version.parse::<u32>() {
            Ok(version) => (name, Some(version)),
            Err(_) => {
                return Err(Error::Input(format!(
                    "{text:?}: the version after @ must be a number"
                )));
            }
        },
    };
    let known: Vec<&ProjectorId> = known.into_iter().collect();
    let is_named =
        |id: &&&ProjectorId| id.name == name && version.is_none_or(|version| version == id.version);
    let found: Vec<&ProjectorId> = known.iter().filter(is_named).copied().collect();
    if found.is_empty() {
        return Err(Error::Input(describe_unknown(text, name, &known, place)));
    }
    Ok(found)
}

fn describe_unknown(text: &str, name: &str, known: &[&ProjectorId], place: &str) -> String {
    let names: Vec<&str> = known.iter().map(|id| id.name.as_str()).collect();
    // The name can be right, and the version wrong.
    let close = if names.contains(&name) { Some(name) } else { nearest(name, &names) };
    let similar: Vec<String> = known
        .iter()
        .filter(|id| Some(id.name.as_str()) == close)
        .map(|id| id.to_string())
        .collect();
    let mut error = format!("{place} has no projector {text:?}");
    if !similar.is_empty() {
        error.push_str(&format!("; did you mean {}?", similar.join(" or ")));
        return error;
    }
    let listed: Vec<String> = known.iter().take(MAX_LISTED).map(|id| id.to_string()).collect();
    error.push_str(&match known.len() {
        0 => "; it has none".to_owned(),
        count if count > MAX_LISTED => {
            format!("; it has {} and {} more", listed.join(", "), count - MAX_LISTED)
        }
        _ => format!("; it has {}", listed.join(", ")),
    });
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> Vec<ProjectorId> {
        let id = |name: &str, version| ProjectorId { name: name.into(), version };
        vec![id("alpha", 1), id("alpha", 2), id("gamma", 1)]
    }

    fn named(text: &str) -> Result<Vec<String>, String> {
        let ids = ids();
        match find(text, &ids, "this set") {
            Ok(found) => Ok(found.into_iter().map(ToString::to_string).collect()),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn a_name_stands_for_every_version_and_a_misspelt_one_gets_a_suggestion() {
        assert_eq!(named("alpha"), Ok(vec!["alpha@1".into(), "alpha@2".into()]));
        assert_eq!(named("alpha@2"), Ok(vec!["alpha@2".into()]));
        let refused = |text: &str| named(text).expect_err("the projector is unknown");
        assert_eq!(refused("gama"), "this set has no projector \"gama\"; did you mean gamma@1?");
        assert_eq!(
            refused("alpha@3"),
            "this set has no projector \"alpha@3\"; did you mean alpha@1 or alpha@2?"
        );
        assert!(refused("other").ends_with("; it has alpha@1, alpha@2, gamma@1"));
        assert!(refused("alpha@x").contains("must be a number"));
    }

    #[test]
    fn an_error_lists_at_most_ten_projectors() {
        let many: Vec<ProjectorId> =
            (0..40).map(|n| ProjectorId { name: format!("projector_{n}"), version: 1 }).collect();
        let error = find("other", &many, "the ledger").expect_err("unknown").to_string();
        assert!(error.ends_with("projector_9@1 and 30 more"), "{error}");
    }
}
