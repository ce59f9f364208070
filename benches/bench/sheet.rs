//! What was measured, as a table for people and as JSON with every round.

use std::fmt;

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::lanes::{Series, median};
use crate::machine::load;

/// One line of the table: ours, and the loops of which the best is the bound.
pub struct Line {
    pub row: u32,
    pub what: String,
    pub unit: Unit,
    pub ours: Series<f64>,
    /// None where ours is judged by itself.
    pub bounds: Vec<Series<f64>>,
    pub target: Option<Target>,
    /// What a reader must know to read the line.
    pub note: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    PerSecond,
    Milliseconds,
    Seconds,
    Mebibytes,
}

/// What the issue asks for.
#[derive(Clone, Copy)]
pub enum Target {
    /// Ours ÷ the bound.
    RatioAtLeast(f64),
    RatioAtMost(f64),
    RatioWithin(f64, f64),
    /// Ours − the bound.
    MoreByAtMost(f64),
    /// Ours.
    AtMost(f64),
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
            Target::RatioAtLeast(least) => write!(f, "≥ {least}"),
            Target::RatioAtMost(most) => write!(f, "≤ {most}"),
            Target::RatioWithin(least, most) => write!(f, "{least}–{most}"),
            Target::MoreByAtMost(most) => write!(f, "≤ +{most}"),
            Target::AtMost(most) => write!(f, "≤ {most}"),
        }
    }
}

impl Line {
    fn bound(&self) -> Option<&Series<f64>> {
        self.unit.best(&self.bounds)
    }

    /// What the target is about: the median over the rounds of ours to the bound in the same round.
    fn judged(&self) -> Option<Spread> {
        let figures: Vec<f64> = match (self.bound(), self.target) {
            (_, Some(Target::AtMost(_))) => self.ours.rounds.clone(),
            (Some(bound), Some(Target::MoreByAtMost(_))) => {
                pairs(&self.ours, bound).map(|(ours, b)| ours - b).collect()
            }
            (Some(bound), _) => pairs(&self.ours, bound).map(|(ours, b)| ours / b).collect(),
            (None, _) => return None,
        };
        let (least, most) = (figures.iter().copied().reduce(f64::min)?, figures.iter().copied().reduce(f64::max)?);
        Some(Spread { median: median(&figures), least, most })
    }

    /// `None` where nothing is asked for.
    fn is_met(&self) -> Option<bool> {
        let figure = self.judged()?.median;
        Some(match self.target? {
            Target::RatioAtLeast(least) => figure >= least,
            Target::RatioWithin(least, most) => (least..=most).contains(&figure),
            Target::RatioAtMost(most) | Target::MoreByAtMost(most) | Target::AtMost(most) => figure <= most,
        })
    }

    fn cells(&self) -> [String; 8] {
        let judged = self.judged();
        let two = |figure: f64| if figure.abs() < 10.0 { format!("{figure:.2}") } else { format!("{figure:.1}") };
        [
            self.row.to_string(),
            self.what.clone(),
            self.unit.show(self.ours.median()),
            self.bound().map(|bound| self.unit.show(bound.median())).unwrap_or_default(),
            judged.as_ref().map(|judged| two(judged.median)).unwrap_or_default(),
            judged.as_ref().map(|judged| format!("{}–{}", two(judged.least), two(judged.most))).unwrap_or_default(),
            self.target.map(|target| target.to_string()).unwrap_or_default(),
            self.is_met().map(|met| if met { "met" } else { "MISSED" }.to_owned()).unwrap_or_default(),
        ]
    }

    /// The lanes by name, where the table has room for figures only.
    fn legend(&self) -> String {
        let lane = |series: &Series<f64>| format!("{} {}", series.name, self.unit.show(series.median()));
        let bounds: Vec<String> = self.bounds.iter().map(lane).collect();
        let mut legend = lane(&self.ours);
        if !bounds.is_empty() {
            legend += &format!(" ÷ {}", bounds.join(" | "));
        }
        match &self.note {
            Some(note) => format!("{legend}; {note}"),
            None => legend,
        }
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
        eprintln!("{row}  {what}: {ours} ÷ {bound} = {judged} ({spread}) {target} {met}");
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
        table.set_header(["row", "what", "ours", "bound", "ratio", "spread", "target", ""]);
        for (line, _) in &self.lines {
            let is_figure = |column: usize| (2..=6).contains(&column);
            table.add_row(line.cells().into_iter().enumerate().map(|(column, text)| match is_figure(column) {
                true => Cell::new(text).set_alignment(CellAlignment::Right),
                false => Cell::new(text),
            }));
        }
        writeln!(f, "{table}\n")?;
        for (line, _) in &self.lines {
            writeln!(f, "{:>3}  {}: {}", line.row, line.what, line.legend())?;
        }
        Ok(())
    }
}

fn pairs<'a>(ours: &'a Series<f64>, bound: &'a Series<f64>) -> impl Iterator<Item = (f64, f64)> + 'a {
    ours.rounds.iter().copied().zip(bound.rounds.iter().copied())
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
