//! The book that `mdbook build` makes of the pages. mdBook itself is not needed here: `docs/book`
//! gets the pages as mdBook would send them.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::is_relative;
use super::page::{Page, root};

#[test]
fn every_link_of_the_book_leads_to_its_page_or_to_a_file_of_the_checkout() {
    let pages = book();
    assert!(pages.contains_key("architecture.md") && pages.contains_key("local-parts.md"));
    let mut broken = Vec::new();
    for (path, page) in &pages {
        for link in page.links().iter().filter(|link| is_relative(link)) {
            let (target, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if target.is_empty() { path } else { target };
            // The pages of the book are in target/book.
            let file = target
                .strip_prefix("../../")
                .map_or(root().join("docs").join(target), |file| root().join(file));
            let is_right = match pages.get(target) {
                Some(page) => {
                    anchor.is_empty() || page.anchors().iter().any(|known| known == anchor)
                }
                None => !target.ends_with(".md") && file.exists(),
            };
            if !is_right {
                broken.push(format!("{path}: {link}"));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// The pages of the book by their paths in the book.
fn book() -> BTreeMap<String, Page> {
    let chapters: Vec<Value> = Page::read("docs/SUMMARY.md")
        .links()
        .into_iter()
        .map(|path| {
            let content = Page::read(&format!("docs/{path}")).text;
            json!({"Chapter": {"path": path, "source_path": path, "content": content,
                "sub_items": []}})
        })
        .collect();
    let input = json!([{"root": root()}, {"items": chapters}]);
    let mut preprocessor = Command::new(root().join("docs/book"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("docs/book starts");
    let mut stdin = preprocessor.stdin.take().expect("standard input is a pipe");
    stdin.write_all(input.to_string().as_bytes()).expect("docs/book reads the pages");
    drop(stdin);
    let ended = preprocessor.wait_with_output().expect("docs/book ends");
    assert!(ended.status.success(), "docs/book failed");
    let book: Value = serde_json::from_slice(&ended.stdout).expect("docs/book writes JSON");
    let chapters = book["items"].as_array().expect("a list").iter();
    chapters
        .filter_map(|item| item.get("Chapter"))
        .map(|chapter| {
            let text = |key: &str| chapter[key].as_str().expect("a text").to_owned();
            let page = Page { path: text("path").into(), text: text("content") };
            (text("path"), page)
        })
        .collect()
}
