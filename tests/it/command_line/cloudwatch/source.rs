//! The fields of every log line in the source, found by reading it: `info!(projector = %id,
//! position, "…")`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const MACROS: [&str; 4] = ["error!(", "warn!(", "info!(", "debug!("];

pub fn fields() -> BTreeSet<String> {
    let mut fields = BTreeSet::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut fields);
    fields
}

fn read(folder: &Path, fields: &mut BTreeSet<String>) {
    for file in fs::read_dir(folder).expect("the source") {
        let path = file.expect("a file").path();
        if path.is_dir() {
            read(&path, fields);
            continue;
        }
        let text = fs::read_to_string(&path).expect("text");
        for name in MACROS {
            for (at, _) in text.match_indices(name) {
                for argument in arguments(&text[at + name.len()..]) {
                    fields.extend(field(&argument));
                }
            }
        }
    }
}

/// What stands between a parenthesis that is open and its end, at the commas.
fn arguments(text: &str) -> Vec<String> {
    let (mut depth, mut in_text, mut escaped) = (0, false, false);
    let mut arguments = vec![String::new()];
    for c in text.chars() {
        match c {
            _ if in_text => {
                in_text = escaped || c != '"';
                escaped = c == '\\' && !escaped;
            }
            '"' => in_text = true,
            ')' if depth == 0 => return arguments,
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                arguments.push(String::new());
                continue;
            }
            _ => {}
        }
        if let Some(last) = arguments.last_mut() {
            last.push(c);
        }
    }
    panic!("a macro that does not end: {text:.80}")
}

/// The name of `name = value`, `%name`, `?name` or `name`; what follows the message are its
/// parameters.
fn field(argument: &str) -> Option<String> {
    let argument = argument.trim();
    let is_name = |text: &&str| {
        !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
    };
    let name = match argument.split_once(" = ") {
        Some((name, _)) => name,
        None => argument.trim_start_matches(['%', '?']),
    };
    Some(name).filter(is_name).map(str::to_owned)
}
