//! Finds the fields of every log line in the source text: `info!(projector = %id, position, "…")`.

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
    for file in fs::read_dir(folder).expect("the folder is readable") {
        let path = file.expect("the entry is readable").path();
        if path.is_dir() {
            read(&path, fields);
            continue;
        }
        let text = fs::read_to_string(&path).expect("the file is UTF-8");
        for name in MACROS {
            for (at, _) in text.match_indices(name) {
                for argument in arguments(&text[at + name.len()..]) {
                    fields.extend(field(&argument));
                }
            }
        }
    }
}

/// The arguments of a macro, split at commas. `text` begins after the opening parenthesis.
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
    panic!("a macro without its closing parenthesis: {text:.80}")
}

/// The field's name in `name = value`, `%name`, `?name` or `name`. Format parameters after the
/// message are counted, too.
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
