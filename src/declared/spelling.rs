//! Suggests the known word that a misspelled word was meant to be.

/// The nearest known word, if it is at most two edits away. An edit adds, removes or replaces a
/// letter, or swaps two.
pub(super) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let word: Vec<char> = word.to_lowercase().chars().collect();
    // All known words are shorter, and the cost is the product of both lengths.
    if word.len() > 40 {
        return None;
    }
    let near = known
        .iter()
        .map(|known| (edit_distance(&word, known), *known))
        .min_by_key(|(distance, _)| *distance);
    near.filter(|(distance, known)| *distance <= 2 && *distance * 2 < known.len())
        .map(|(_, known)| known)
}

/// The Damerau-Levenshtein distance in its restricted form: no edits inside swapped letters.
fn edit_distance(word: &[char], known: &str) -> usize {
    let known: Vec<char> = known.chars().collect();
    let mut table = vec![vec![0; known.len() + 1]; word.len() + 1];
    for i in 0..=word.len() {
        for j in 0..=known.len() {
            table[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replaced = table[i - 1][j - 1] + usize::from(word[i - 1] != known[j - 1]);
                let is_swapped =
                    i > 1 && j > 1 && word[i - 1] == known[j - 2] && word[i - 2] == known[j - 1];
                let swap = if is_swapped { table[i - 2][j - 2] + 1 } else { usize::MAX };
                replaced.min(table[i - 1][j] + 1).min(table[i][j - 1] + 1).min(swap)
            };
        }
    }
    table[word.len()][known.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_gets_a_suggestion_and_an_unrelated_word_gets_none() {
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
