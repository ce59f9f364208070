//! Which known word was probably meant.

/// The known word that is at most two slips from this one: letters added, left out, swapped or
/// mistaken.
pub(super) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let word: Vec<char> = word.to_lowercase().chars().collect();
    // No known word is near this long, and the distance costs the product of both lengths.
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

/// The Damerau-Levenshtein distance, in its common form without a second edit inside a swap.
fn edit_distance(word: &[char], known: &str) -> usize {
    let known: Vec<char> = known.chars().collect();
    let mut table = vec![vec![0; known.len() + 1]; word.len() + 1];
    for i in 0..=word.len() {
        for j in 0..=known.len() {
            table[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let mistaken = table[i - 1][j - 1] + usize::from(word[i - 1] != known[j - 1]);
                let swapped =
                    i > 1 && j > 1 && word[i - 1] == known[j - 2] && word[i - 2] == known[j - 1];
                let swap = if swapped { table[i - 2][j - 2] + 1 } else { usize::MAX };
                mistaken.min(table[i - 1][j] + 1).min(table[i][j - 1] + 1).min(swap)
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
