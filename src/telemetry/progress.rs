//! The progress bar of a long command. Log lines are printed above it.

use std::io::{self, Write, stderr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};

/// The bar that is shown now.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// A progress bar on standard error. It disappears when this is dropped.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// Shows a bar. Returns `None` if standard error cannot show one: it is not a terminal, or
    /// `TERM` says that it cannot move the cursor.
    pub(crate) fn show() -> Option<Self> {
        let bar = ProgressBar::new(0);
        if bar.is_hidden() {
            return None;
        }
        *shown() = Some(bar.clone());
        Some(Bar(bar))
    }

    /// Shows that `done` of `total` is done, with a short text.
    pub(crate) fn set(&self, done: u64, total: u64, text: String) {
        self.0.set_style(style("{wide_bar} {msg}"));
        self.0.set_length(total);
        self.0.set_message(text);
        self.0.set_position(done);
    }

    /// Shows a text instead of the bar, cut at the end of the line.
    pub(crate) fn set_text(&self, text: String) {
        self.0.set_style(style("{wide_msg}"));
        self.0.set_message(text);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        *shown() = None;
        self.0.finish_and_clear();
    }
}

fn shown() -> MutexGuard<'static, Option<ProgressBar>> {
    SHOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|error| unreachable!("the template is valid: {error}"));
    if is_utf8_locale(|name| std::env::var(name).ok()) {
        style
    } else {
        style.progress_chars("=> ")
    }
}

/// Whether the terminal expects UTF-8. The first variable that is set decides, as in POSIX.
fn is_utf8_locale(variable: impl Fn(&str) -> Option<String>) -> bool {
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .find_map(|name| variable(name).filter(|value| !value.is_empty()))
        .unwrap_or_default()
        .to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// Writes log lines to standard error, above the bar if there is one.
pub(super) struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.write_all(line).map(|()| line.len())
    }

    fn write_all(&mut self, line: &[u8]) -> io::Result<()> {
        let bar = shown().clone();
        let write = || stderr().lock().write_all(line);
        match bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_locale_variable_that_is_set_decides_about_utf_8() {
        let of = |set: &[(&str, &str)]| {
            is_utf8_locale(|name| {
                set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert!(of(&[("LANG", "de_CH.UTF-8")]) && of(&[("LC_ALL", ""), ("LC_CTYPE", "C.utf8")]));
        assert!(!of(&[]) && !of(&[("LC_ALL", "C"), ("LANG", "de_CH.UTF-8")]));
    }
}
