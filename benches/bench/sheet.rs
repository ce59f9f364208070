//! What was measured, as a table for people and as JSON with every round.

use std::collections::HashSet;
use std::fmt;

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::lanes::{Series, median};
use crate::machine::{self, load};

/// One line of the table: ours, and the loops of which the best is the bound.
pub struct Line {
    pub row: u32,
    pub what: String,
    pub unit: Unit,
    pub ours: Series<f64>,
    pub bounds: Vec<Series<f64>>,
    pub judged_by: By,
    pub target: Option<Target>,
    /// What a reader must know to read the line.
    pub note: Option<String>,
}

/// What the target is about: of each round, and then the median.
#[derive(Clone, Copy)]
pub enum By {
    /// Ours ÷ the bound.
    Ratio,
    /// Ours − the bound.
    Difference,
    /// Ours alone.
    Itself,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    PerSecond,
    Milliseconds,
    Seconds,
    Mebibytes,
}

/// What is asked for.
#[derive(Clone, Copy)]
pub enum Target {
    AtLeast(f64),
    AtMost(f64),
    Within(f64, f64),
}

/// A figure that was taken every round.
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

pub struct Sheet {
    /// On what it was measured.
    facts: Value,
    lines: Vec<(Line, f64)>,
}

impl Unit {
    fn best<'a>(self, series: &'a [Series<f64>]) -> Option<&'a Series<f64>> {
        let by_median = |a: &&'a Series<f64>, b: &&'a Series<f64>| a.median().total_cmp(&b.median());
        match self {
            Unit::PerSecond => series.iter().max_by(by_median),
            Unit::Milliseconds | Unit::Seconds | Unit::Mebibytes => series.iter().min_by(by_median),
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Unit::PerSecond => format!("{}/s", grouped(value)),
            Unit::Milliseconds => format!("{value:.2} ms"),
            Unit::Seconds => format!("{value:.2} s"),
            Unit::Mebibytes => format!("{value:.1} MiB"),
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Unit::PerSecond => "per second",
            Unit::Milliseconds => "ms",
            Unit::Seconds => "s",
            Unit::Mebibytes => "MiB",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::AtLeast(least) => write!(f, "≥ {least}"),
            Target::AtMost(most) => write!(f, "≤ {most}"),
            Target::Within(least, most) => write!(f, "{least}–{most}"),
        }
    }
}

impl Line {
    fn bound(&self) -> Option<&Series<f64>> {
        self.unit.best(&self.bounds)
    }

    /// `None` where there is nothing to be compared with.
    fn judged(&self) -> Option<Spread> {
        let pairs = || Some(self.ours.rounds.iter().zip(&self.bound()?.rounds));
        let figures: Vec<f64> = match self.judged_by {
            By::Ratio => pairs()?.map(|(ours, bound)| ours / bound).collect(),
            By::Difference => pairs()?.map(|(ours, bound)| ours - bound).collect(),
            By::Itself => self.ours.rounds.clone(),
        };
        let (least, most) = (figures.iter().copied().reduce(f64::min)?, figures.iter().copied().reduce(f64::max)?);
        Some(Spread { median: median(&figures), least, most })
    }

    /// `None` where nothing is asked for.
    fn is_met(&self) -> Option<bool> {
        let figure = self.judged()?.median;
        Some(match self.target? {
            Target::AtLeast(least) => figure >= least,
            Target::AtMost(most) => figure <= most,
            Target::Within(least, most) => (least..=most).contains(&figure),
        })
    }

    fn cells(&self) -> [String; 8] {
        let judged = self.judged();
        let two = |figure: f64| match self.judged_by {
            By::Difference => format!("{figure:+.1}"),
            _ if figure.abs() < 10.0 => format!("{figure:.2}"),
            _ => format!("{figure:.1}"),
        };
        [
            self.row.to_string(),
            self.what.clone(),
            self.unit.show(self.ours.median()),
            self.bound().map(|bound| self.unit.show(bound.median())).unwrap_or_default(),
            judged.as_ref().map(|judged| two(judged.median)).unwrap_or_default(),
            judged.as_ref().map(|judged| format!("{} to {}", two(judged.least), two(judged.most))).unwrap_or_default(),
            self.target.map(|target| target.to_string()).unwrap_or_default(),
            self.is_met().map(|met| if met { "met" } else { "MISSED" }.to_owned()).unwrap_or_default(),
        ]
    }

    /// What the lanes are, and what all the bounds came to where there were several.
    fn legend(&self) -> Option<String> {
        let bounds: Vec<String> = match self.bounds.as_slice() {
            [] => return self.note.clone(),
            [bound] => vec![bound.name.clone()],
            several => {
                several.iter().map(|bound| format!("{} ({})", bound.name, self.unit.show(bound.median()))).collect()
            }
        };
        let lanes = format!("{} ÷ {}", self.ours.name, bounds.join(", "));
        Some(match &self.note {
            Some(note) => format!("{lanes}; {note}"),
            None => lanes,
        })
    }

    fn json(&self, load: f64) -> Value {
        let series =
            |series: &Series<f64>| json!({"name": series.name, "median": series.median(), "rounds": series.rounds});
        let judged =
            self.judged().map(|spread| json!({"median": spread.median, "least": spread.least, "most": spread.most}));
        json!({
            "row": self.row,
            "what": self.what,
            "unit": self.unit.as_str(),
            "ours": series(&self.ours),
            "bounds": self.bounds.iter().map(series).collect::<Vec<_>>(),
            "judged": judged,
            "target": self.target.map(|target| target.to_string()),
            "met": self.is_met(),
            "note": self.note,
            "load_afterwards": load,
        })
    }
}

impl Sheet {
    pub fn new(facts: Value) -> Self {
        Sheet { facts, lines: Vec::new() }
    }

    /// Takes a line, and tells it at once: the whole takes long.
    pub fn add(&mut self, line: Line) {
        let [row, what, ours, bound, judged, spread, target, met] = line.cells();
        eprintln!("{row}  {what}: {ours} | {bound} | {judged} ({spread}) {target} {met}");
        self.lines.push((line, load()));
    }

    pub fn json(&self) -> Value {
        let lines: Vec<Value> = self.lines.iter().map(|(line, load)| line.json(*load)).collect();
        json!({"facts": self.facts, "lines": lines})
    }
}

impl fmt::Display for Sheet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header(["row", "what", "ours", "bound", "median", "spread", "target", ""]);
        for (line, _) in &self.lines {
            let is_figure = |column: usize| (2..=6).contains(&column);
            table.add_row(line.cells().into_iter().enumerate().map(|(column, text)| match is_figure(column) {
                true => Cell::new(text).set_alignment(CellAlignment::Right),
                false => Cell::new(text),
            }));
        }
        writeln!(f, "{}\n\n{table}\n", machine::describe(&self.facts))?;
        let mut told = HashSet::new();
        for (line, _) in &self.lines {
            let legend = line.legend().map(|legend| format!("{:>3}  {legend}", line.row));
            if let Some(legend) = legend.filter(|legend| told.insert(legend.clone())) {
                writeln!(f, "{legend}")?;
            }
        }
        Ok(())
    }
}

/// 1234567 as 1,234,567.
pub fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
