//! What commands print to standard output: JSON, and tables for people.
//!
//! On a terminal, text is wrapped to its width. Elsewhere each error is on lines of its own, so
//! that `grep` finds it. Colours are for terminals that want them: `NO_COLOR`, `CLICOLOR`,
//! `CLICOLOR_FORCE` and `TERM=dumb` decide.

use std::io::{ErrorKind, IsTerminal, Write, stdout};

use anstyle::{AnsiColor, Style};
use comfy_table::{CellAlignment, ContentArrangement, Table, TableStyle};
use serde::Serialize;

use crate::engine::error::Error;
use crate::model::text::{self, escape_control, escape_control_lines};

/// Statuses from bad to good. A table and its summary have them in this order.
const STATUS_ORDER: [&str; 8] =
    ["broken", "retrying", "stalled", "booting", "new", "live", "finished", "retired"];

/// Details stand below their row, with this indent.
const INDENT: &str = "    ";

/// The narrowest terminal that text is wrapped for.
const MIN_WIDTH: usize = 40;

/// In a table, a longer text is cut in its middle: the cause of an error is usually at its end.
const MAX_DETAIL_LINES: usize = 10;

/// Prints a result to standard output. A closed reader (`| head`) is not an error.
pub(super) fn print(text: impl std::fmt::Display) -> Result<(), Error> {
    check(writeln!(anstream::stdout(), "{text}"))
}

/// Prints a result as one line of JSON.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), Error> {
    let json = serde_json::to_string(value);
    let json =
        json.unwrap_or_else(|error| unreachable!("strings and numbers are valid JSON: {error}"));
    check(writeln!(stdout(), "{json}"))
}

fn check(written: std::io::Result<()>) -> Result<(), Error> {
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::Input(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// The columns of the terminal that standard output is. `None`: it is not a terminal.
pub(super) fn terminal_width() -> Option<usize> {
    let (width, _) = stdout().is_terminal().then(terminal_size::terminal_size).flatten()?;
    Some(usize::from(width.0).max(MIN_WIDTH))
}

/// Wraps a text between words. Control characters are escaped; line breaks are kept.
pub(super) fn wrap(text: &str, indent: &str, width: Option<usize>) -> Vec<String> {
    let text = escape_control_lines(text);
    let indented = |line: &str| format!("{indent}{line}").trim_end().to_owned();
    let Some(width) = width else { return text.lines().map(indented).collect() };
    let mut table = Table::new();
    table
        .load_style(TableStyle::new())
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(u16::try_from(width.saturating_sub(indent.len())).unwrap_or(u16::MAX))
        .add_row([text]);
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, 0));
    });
    table.lines().map(|line| indented(&line)).collect()
}

/// A table of projectors. The worst statuses come first.
pub(super) struct ProjectorTable {
    /// The names of the columns of numbers.
    pub(super) figures: Vec<&'static str>,
    pub(super) rows: Vec<ProjectorRow>,
    /// Whether long details are cut.
    pub(super) is_brief: bool,
}

/// One projector in a table.
pub(super) struct ProjectorRow {
    pub(super) status: &'static str,
    pub(super) figures: Vec<String>,
    /// `NAME@VERSION`
    pub(super) projector: String,
    /// Short remarks, on the same line.
    pub(super) notes: Vec<String>,
    /// Longer texts, below the line.
    pub(super) details: Vec<String>,
}

impl ProjectorTable {
    /// How many projectors have which status: `3 projectors: 1 broken, 2 live`.
    pub(super) fn summary(&self) -> String {
        let counts: Vec<String> = STATUS_ORDER
            .iter()
            .filter_map(|status| {
                let count = self.rows.iter().filter(|row| row.status == *status).count();
                (count > 0).then(|| format!("{count} {}", colored(status)))
            })
            .collect();
        format!("{}: {}", text::count(self.rows.len() as u64, "projector"), counts.join(", "))
    }

    /// Formats the table for a terminal of this width.
    pub(super) fn format(mut self, width: Option<usize>) -> String {
        self.rows.sort_by_key(|row| (rank(row.status), row.details.is_empty()));
        let mut table = Table::new();
        table.load_style(TableStyle::new());
        table.set_header(std::iter::once("STATUS").chain(self.figures.iter().copied()));
        for row in &self.rows {
            let cells = std::iter::once(row.status).chain(row.figures.iter().map(String::as_str));
            table.add_row(cells);
        }
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if index > 0 {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let mut aligned = table.lines();
        let mut lines = vec![format!("{}PROJECTOR", aligned.next().unwrap_or_default())];
        let mut last_details = &Vec::new();
        for (start, row) in aligned.zip(&self.rows) {
            lines.extend(row.lines(&start, width));
            // All projectors that another one has stalled have the same details.
            if row.details != *last_details {
                for detail in &row.details {
                    let wrapped = wrap(detail, INDENT, width);
                    let is_cut = self.is_brief && width.is_some();
                    lines.extend(if is_cut { shorten(wrapped, &row.projector) } else { wrapped });
                }
            }
            last_details = &row.details;
        }
        lines.join("\n")
    }
}

impl ProjectorRow {
    /// The line of the row, which begins with its aligned columns. Notes and names that do
    /// not fit go to lines of their own.
    fn lines(&self, start: &str, width: Option<usize>) -> Vec<String> {
        let room = width.map_or(usize::MAX, |width| width.saturating_sub(start.len()));
        let notes = if self.notes.is_empty() {
            String::new()
        } else {
            format!("  ({})", self.notes.join("; "))
        };
        let notes = escape_control(&notes);
        let start = start.replacen(self.status, &colored(self.status), 1);
        if self.projector.len() + notes.len() <= room {
            vec![format!("{start}{}{notes}", self.projector)]
        } else if self.projector.len() <= room {
            vec![format!("{start}{}", self.projector), format!("{INDENT}{}", notes.trim_start())]
        } else {
            vec![start.trim_end().to_owned(), format!("{INDENT}{}{notes}", self.projector)]
        }
    }
}

/// Cuts the middle of a long text.
fn shorten(mut lines: Vec<String>, projector: &str) -> Vec<String> {
    if lines.len() > MAX_DETAIL_LINES {
        let (first, last) = (MAX_DETAIL_LINES / 2, MAX_DETAIL_LINES / 2 - 1);
        let cut = lines.len() - first - last;
        let note = format!(
            "{INDENT}[{} cut: projectionist status {projector}]",
            text::count(cut as u64, "line")
        );
        lines.splice(first..first + cut, [note]);
    }
    lines
}

fn rank(status: &str) -> usize {
    STATUS_ORDER.iter().position(|known| *known == status).unwrap_or(STATUS_ORDER.len())
}

/// A status in its colour.
fn colored(status: &str) -> String {
    let style = match status {
        "broken" => AnsiColor::Red.on_default().bold(),
        "retrying" | "stalled" => AnsiColor::Yellow.on_default(),
        "live" => AnsiColor::Green.on_default(),
        "finished" | "retired" => Style::new().dimmed(),
        _ => Style::new(),
    };
    format!("{style}{status}{style:#}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(status: &'static str, projector: &str) -> ProjectorRow {
        let figures = vec!["7".into(), "1,250".into()];
        let (notes, details) = (Vec::new(), Vec::new());
        ProjectorRow { status, figures, projector: projector.into(), notes, details }
    }

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    fn table(rows: Vec<ProjectorRow>) -> ProjectorTable {
        ProjectorTable { figures: vec!["POSITION", "LAG"], rows, is_brief: true }
    }

    fn long_name() -> String {
        format!("{}@1", "n".repeat(64))
    }

    #[test]
    fn the_worst_status_comes_first_and_the_columns_are_aligned() {
        let mut broken = row("broken", "b@1");
        broken.details = vec!["at 8 (Opened)".into(), "first line\nsecond line".into()];
        let mut noted = row("live", "a@1");
        noted.notes = vec!["once".into(), "not in this set".into()];
        let table = table(vec![noted, row("live", "c@1"), broken]);
        assert_eq!(plain(&table.summary()), "3 projectors: 1 broken, 2 live");
        let expected = "\
STATUS  POSITION    LAG  PROJECTOR
broken         7  1,250  b@1
    at 8 (Opened)
    first line
    second line
live           7  1,250  a@1  (once; not in this set)
live           7  1,250  c@1";
        assert_eq!(plain(&table.format(Some(80))), expected);
    }

    #[test]
    fn a_name_that_does_not_fit_the_terminal_goes_to_a_line_of_its_own() {
        let lines = |width| plain(&table(vec![row("live", &long_name())]).format(width));
        assert_eq!(
            lines(Some(80)),
            format!(
                "STATUS  POSITION    LAG  PROJECTOR\nlive           7  1,250\n    {}",
                long_name()
            )
        );
        assert_eq!(lines(None).lines().count(), 2, "a pipe gets one line for each projector");
        assert_eq!(lines(Some(120)).lines().count(), 2);
    }

    #[test]
    fn a_long_error_keeps_its_beginning_and_its_end_on_a_terminal_and_is_whole_in_a_pipe() {
        let long = format!("first {} last", "word ".repeat(500));
        let formatted = |width, is_brief| {
            let mut broken = row("broken", "b@1");
            broken.details = vec![long.clone()];
            plain(&ProjectorTable { is_brief, ..table(vec![broken]) }.format(width))
        };
        let brief = formatted(Some(80), true);
        assert!(brief.contains("first word") && brief.ends_with("last"), "{brief}");
        assert!(brief.contains("lines cut: projectionist status b@1]"), "{brief}");
        assert!(brief.lines().all(|line| line.len() <= 80), "{brief}");
        assert!(formatted(None, true).contains(&long), "a pipe gets the whole error");
        let whole = formatted(Some(80), false);
        assert!(!whole.contains("cut:"), "{whole}");
        assert!(whole.lines().all(|line| line.len() <= 80), "{whole}");
    }

    #[test]
    fn projectors_with_the_same_details_show_them_once() {
        let stalled = |name| {
            let details = vec!["another projector failed".to_owned()];
            ProjectorRow { details, ..row("stalled", name) }
        };
        let formatted = table(vec![stalled("a@1"), stalled("b@1")]).format(None);
        assert_eq!(formatted.matches("another").count(), 1, "{formatted}");
    }
}
