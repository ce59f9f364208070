//! A Markdown page, as far as the tests read it: headings, links, tables, code.

use std::fs;
use std::path::{Path, PathBuf};

/// A page of the repository.
pub struct Page {
    /// From the root of the repository.
    pub path: PathBuf,
    pub text: String,
}

/// A fenced block of code.
#[derive(Debug)]
pub struct Block {
    /// The words after the fence: `rust,no_run`.
    pub language: String,
    pub code: String,
}

impl Page {
    pub fn read(path: &str) -> Self {
        let text =
            fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        Page { path: path.into(), text }
    }

    /// Every page of the repository. Folders that git ignores, or whose names begin with a dot,
    /// have none.
    pub fn all() -> Vec<Page> {
        let mut paths = Vec::new();
        find_pages(Path::new(""), &mut paths);
        paths.sort_unstable();
        paths.iter().map(|path| Page::read(path.to_str().expect("a name in UTF-8"))).collect()
    }

    /// The text below a heading of level 2, without the sections after it.
    pub fn section(&self, heading: &str) -> &str {
        let (_, rest) = self.text.split_once(&format!("\n## {heading}\n")).unwrap_or_else(|| {
            panic!("{} has no section {heading:?}", self.path.display());
        });
        rest.split("\n## ").next().expect("the section's text")
    }

    /// The anchors of the headings, as code hosts make them.
    pub fn anchors(&self) -> Vec<String> {
        let mut anchors: Vec<String> = Vec::new();
        for line in prose(&self.text).lines() {
            let Some((_, heading)) =
                line.split_once("# ").filter(|(level, _)| level.bytes().all(|b| b == b'#'))
            else {
                continue;
            };
            let anchor = anchor(heading);
            let is_repetition = |other: &&String| {
                other.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-') == anchor
            };
            let repetitions = anchors.iter().filter(is_repetition).count();
            anchors.push(if repetitions == 0 { anchor } else { format!("{anchor}-{repetitions}") });
        }
        anchors
    }

    /// The targets of all links: `[text](target)`, and `[name]: target`.
    pub fn links(&self) -> Vec<String> {
        let text = without_code(&prose(&self.text));
        let inline = text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
        let defined = definitions(&text).map(|(_, target)| target);
        inline.chain(defined).map(str::to_owned).collect()
    }

    /// Each `[name]: target`, with the name in lower case and without backticks.
    pub fn definitions(&self) -> Vec<(String, String)> {
        let text = prose(&self.text);
        definitions(&text)
            .map(|(name, target)| (name.replace('`', "").to_lowercase(), target.to_owned()))
            .collect()
    }

    /// The names of the definitions that links use: [`name`], and `[text][name]`.
    pub fn references(&self) -> Vec<String> {
        let text = prose(&self.text);
        let short = text.split("[`").skip(1).filter_map(|rest| {
            let (name, after) = rest.split_once("`]")?;
            (!after.starts_with(['(', ':', '['])).then_some(name)
        });
        let code_is_gone = without_code(&text);
        let full = code_is_gone.split("][").skip(1).filter_map(|rest| rest.split(']').next());
        short.chain(full).map(str::to_lowercase).collect()
    }

    pub fn blocks(&self) -> Vec<Block> {
        blocks(&self.text)
    }
}

/// The cells of the tables in a text, without the heads.
pub fn rows(section: &str) -> Vec<Vec<&str>> {
    let mut rows = Vec::new();
    let mut is_body = false;
    for line in section.lines() {
        if !line.starts_with('|') {
            is_body = false;
        } else if line.starts_with("| ---") {
            is_body = true;
        } else if is_body {
            rows.push(line.trim_matches('|').split('|').map(str::trim).collect());
        }
    }
    rows
}

pub fn blocks(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for line in text.lines() {
        match (line.trim_start().strip_prefix("```"), &mut open) {
            (Some(language), None) => {
                open = Some(Block { language: language.to_owned(), code: String::new() })
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => block.code.extend([line, "\n"]),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block of code has no end: {open:?}");
    blocks
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn find_pages(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(root().join(folder)).expect("a folder") {
        let name = entry.expect("an entry").file_name().into_string().expect("a name in UTF-8");
        let path = folder.join(&name);
        if name.starts_with('.') || name == "node_modules" || path == Path::new("target") {
            continue;
        } else if root().join(&path).is_dir() {
            find_pages(&path, found);
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
}

/// The text without blocks of code.
fn prose(text: &str) -> String {
    let mut is_code = false;
    let mut prose = String::with_capacity(text.len());
    for line in text.lines() {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        if !is_fence && !is_code {
            prose.extend([line, "\n"]);
        }
    }
    prose
}

/// The text without its code spans. A span ends within its paragraph.
fn without_code(text: &str) -> String {
    let paragraph = |text: &str| text.split('`').step_by(2).collect::<Vec<_>>().join("``");
    text.split("\n\n").map(paragraph).collect::<Vec<_>>().join("\n\n")
}

fn definitions(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| line.strip_prefix('[')?.split_once("]: "))
}

fn anchor(heading: &str) -> String {
    let heading = heading.trim().to_lowercase();
    // A link in a heading counts by its text.
    let text =
        heading.split("](").map(|part| part.split_once(')').map_or(part, |(_, after)| after));
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let text = if heading.contains("](") { text.collect() } else { heading.clone() };
    text.chars().filter(kept).map(|c| if c == ' ' { '-' } else { c }).collect()
}
