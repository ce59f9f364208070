//! Suggestions for misspelt words.

/// Longer words get no suggestion: no known word is as long, and the distance costs the product
/// of both lengths.
const MAX_CHARS: usize = 40;

/// Returns the known word that is at most two slips away: a letter added, left out, swapped with
/// its neighbour or replaced.
pub(crate) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    if word.chars().count() > MAX_CHARS {
        return None;
    }
    let word = word.to_lowercase();
    let (distance, nearest) = known
        .iter()
        .map(|known| (strsim::osa_distance(&word, known), *known))
        .min_by_key(|(distance, _)| *distance)?;
    (distance <= 2 && distance * 2 < nearest.len()).then_some(nearest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_word_finds_its_known_word_and_another_word_finds_none() {
        let known = ["position", "payload", "event_id", "sql"];
        for (word, meant) in [
            ("posittion", Some("position")),
            ("pyaload", Some("payload")),
            ("Payload", Some("payload")),
            ("eventid", Some("event_id")),
            ("sq", Some("sql")),
            ("amount", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, &known), meant, "{word}");
        }
    }
}
