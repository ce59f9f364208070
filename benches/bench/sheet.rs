//! The results, as a table and as JSON with every round.

use std::collections::HashSet;
use std::fmt;

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::lanes::{Series, median};
use crate::machine::{self, load};

/// One line of the table: our figure, and the bare loops of which the fastest is the bound.
#[derive(Clone)]
pub struct Line {
    pub row: u32,
    pub what: String,
    pub unit: Unit,
    pub ours: Series<f64>,
    pub bounds: Vec<Series<f64>>,
    pub compared_by: Comparison,
    pub target: Option<Target>,
    /// What a reader must know to read the line.
    pub note: Option<String>,
}

/// A loop by hand that gives the same guarantees as ours. It is added to a line whose bare loop
/// does less than ours must do.
pub struct EquivalentLoop {
    pub what: String,
    pub bare: Series<f64>,
    /// What the target of the line compares with, measured beside `bare`. If `bare` misses the
    /// target against this, ours cannot meet it either.
    pub bare_bound: Series<f64>,
    /// The ratio of ours to `bare` that is required then.
    pub target: Target,
}

/// How ours is compared with the bound in each round. The target applies to the median of the
/// rounds.
#[derive(Clone, Copy)]
pub enum Comparison {
    /// Ours ÷ the bound.
    Ratio,
    /// Ours − the bound.
    Difference,
    /// Ours alone.
    Absolute,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    PerSecond,
    Milliseconds,
    Seconds,
    Mebibytes,
}

/// The required figure.
#[derive(Clone, Copy)]
pub enum Target {
    AtLeast(f64),
    AtMost(f64),
    Within(f64, f64),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Met,
    Missed,
    /// The line misses its target, but so does the loop by hand, and ours is close enough to that
    /// loop.
    BoundShown,
}

/// The median, least and most of a figure over the rounds.
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

pub struct Sheet {
    /// The machine and the servers.
    facts: Value,
    lines: Vec<ReportedLine>,
}

struct ReportedLine {
    line: Line,
    /// `None` if the line has no target.
    verdict: Option<Verdict>,
    load_afterwards: f64,
}

impl Unit {
    fn best<'a>(self, series: &'a [Series<f64>]) -> Option<&'a Series<f64>> {
        let by_median =
            |a: &&'a Series<f64>, b: &&'a Series<f64>| a.median().total_cmp(&b.median());
        match self {
            Unit::PerSecond => series.iter().max_by(by_median),
            Unit::Milliseconds | Unit::Seconds | Unit::Mebibytes => series.iter().min_by(by_median),
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Unit::PerSecond if value < 10.0 => format!("{value:.2}/s"),
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
    /// A line that is compared by its ratio and has no note.
    pub fn ratio(
        row: u32,
        what: String,
        unit: Unit,
        ours: Series<f64>,
        bounds: Vec<Series<f64>>,
        target: Option<Target>,
    ) -> Self {
        Line { row, what, unit, ours, bounds, compared_by: Comparison::Ratio, target, note: None }
    }

    fn bound(&self) -> Option<&Series<f64>> {
        self.unit.best(&self.bounds)
    }

    /// Compares ours with the bound; `None` without a bound.
    fn compare(&self) -> Option<Spread> {
        let pairs = || Some(self.ours.rounds.iter().zip(&self.bound()?.rounds));
        let figures: Vec<f64> = match self.compared_by {
            Comparison::Ratio => pairs()?.map(|(ours, bound)| ours / bound).collect(),
            Comparison::Difference => pairs()?.map(|(ours, bound)| ours - bound).collect(),
            Comparison::Absolute => self.ours.rounds.clone(),
        };
        let (least, most) =
            (figures.iter().copied().reduce(f64::min)?, figures.iter().copied().reduce(f64::max)?);
        Some(Spread { median: median(&figures), least, most })
    }

    /// The verdict by the line's own target.
    fn verdict(&self) -> Option<Verdict> {
        let figure = self.compare()?.median;
        let is_met = match self.target? {
            Target::AtLeast(least) => figure >= least,
            Target::AtMost(most) => figure <= most,
            Target::Within(least, most) => (least..=most).contains(&figure),
        };
        Some(if is_met { Verdict::Met } else { Verdict::Missed })
    }

    /// Formats a compared figure for the table.
    fn format_figure(&self, figure: f64) -> String {
        match self.compared_by {
            Comparison::Difference => format!("{figure:+.1}"),
            _ if figure.abs() < 10.0 => format!("{figure:.2}"),
            _ => format!("{figure:.1}"),
        }
    }

    /// The line that compares ours with the loop by hand, and the verdict on this line that follows
    /// from both.
    fn judge_with(&self, least: EquivalentLoop) -> (Line, Option<Verdict>) {
        let bare =
            Line { ours: least.bare.clone(), bounds: vec![least.bare_bound], ..self.clone() };
        let figure =
            bare.compare().map(|judged| self.format_figure(judged.median)).unwrap_or_default();
        let other = bare.bound().map_or("", |bound| &bound.name);
        let second = Line {
            what: least.what,
            note: Some(format!("that loop is at {figure} ÷ {other}")),
            bounds: vec![least.bare],
            // A line that meets its own target needs no second one.
            target: Some(least.target).filter(|_| self.verdict() == Some(Verdict::Missed)),
            ..self.clone()
        };
        let verdict = match [self, &bare, &second].map(Line::verdict) {
            [Some(Verdict::Missed), Some(Verdict::Missed), Some(Verdict::Met)] => {
                Some(Verdict::BoundShown)
            }
            [verdict, ..] => verdict,
        };
        (second, verdict)
    }

    /// Names the lanes. Lists the figures of the bounds if there are several.
    fn legend(&self) -> Option<String> {
        let bounds: Vec<String> = match self.bounds.as_slice() {
            [] => return self.note.clone(),
            [bound] => vec![bound.name.clone()],
            several => several
                .iter()
                .map(|bound| format!("{} ({})", bound.name, self.unit.show(bound.median())))
                .collect(),
        };
        let lanes = format!("{} ÷ {}", self.ours.name, bounds.join(", "));
        Some(match &self.note {
            Some(note) => format!("{lanes}; {note}"),
            None => lanes,
        })
    }

    fn json(&self) -> Value {
        let series = |series: &Series<f64>| {
            let Series { name, rounds } = series;
            json!({"name": name, "median": series.median(), "rounds": rounds})
        };
        let judged = self.compare().map(
            |spread| json!({"median": spread.median, "least": spread.least, "most": spread.most}),
        );
        json!({
            "row": self.row,
            "what": self.what,
            "unit": self.unit.as_str(),
            "ours": series(&self.ours),
            "bounds": self.bounds.iter().map(series).collect::<Vec<_>>(),
            "judged": judged,
            "target": self.target.map(|target| target.to_string()),
            "note": self.note,
        })
    }
}

impl Verdict {
    fn as_str(self) -> &'static str {
        match self {
            Verdict::Met => "met",
            Verdict::Missed => "MISSED",
            Verdict::BoundShown => "bound shown",
        }
    }
}

impl ReportedLine {
    fn cells(&self) -> [String; 8] {
        let line = &self.line;
        let judged = line.compare();
        [
            line.row.to_string(),
            line.what.clone(),
            line.unit.show(line.ours.median()),
            line.bound().map(|bound| line.unit.show(bound.median())).unwrap_or_default(),
            judged.as_ref().map(|judged| line.format_figure(judged.median)).unwrap_or_default(),
            judged
                .as_ref()
                .map(|judged| {
                    format!(
                        "{} to {}",
                        line.format_figure(judged.least),
                        line.format_figure(judged.most)
                    )
                })
                .unwrap_or_default(),
            line.target.map(|target| target.to_string()).unwrap_or_default(),
            self.verdict.map(|verdict| verdict.as_str().to_owned()).unwrap_or_default(),
        ]
    }

    fn json(&self) -> Value {
        let mut json = self.line.json();
        json["verdict"] = json!(self.verdict.map(Verdict::as_str));
        json["load_afterwards"] = json!(self.load_afterwards);
        json
    }
}

impl Sheet {
    pub fn new(facts: Value) -> Self {
        Sheet { facts, lines: Vec::new() }
    }

    /// Adds a line.
    pub fn add(&mut self, line: Line) {
        let verdict = line.verdict();
        self.report(line, verdict);
    }

    /// Adds a line, and below it the comparison with the loop by hand.
    pub fn add_with_equivalent(&mut self, line: Line, least: EquivalentLoop) {
        let (second, verdict) = line.judge_with(least);
        self.report(line, verdict);
        self.add(second);
    }

    /// Adds a line and prints it at once, because the whole run takes long.
    fn report(&mut self, line: Line, verdict: Option<Verdict>) {
        let reported = ReportedLine { line, verdict, load_afterwards: load() };
        let [row, what, ours, bound, judged, spread, target, verdict] = reported.cells();
        eprintln!("{row}  {what}: {ours} | {bound} | {judged} ({spread}) {target} {verdict}");
        self.lines.push(reported);
    }

    pub fn json(&self) -> Value {
        let lines: Vec<Value> = self.lines.iter().map(ReportedLine::json).collect();
        json!({"facts": self.facts, "lines": lines})
    }
}

impl fmt::Display for Sheet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header(["row", "what", "ours", "bound", "median", "spread", "target", ""]);
        for reported in &self.lines {
            let is_figure = |column: usize| (2..=6).contains(&column);
            table.add_row(reported.cells().into_iter().enumerate().map(|(column, text)| {
                if is_figure(column) {
                    Cell::new(text).set_alignment(CellAlignment::Right)
                } else {
                    Cell::new(text)
                }
            }));
        }
        writeln!(f, "{}\n\n{table}\n", machine::describe(&self.facts))?;
        let mut reported = HashSet::new();
        for ReportedLine { line, .. } in &self.lines {
            let legend = line.legend().map(|legend| format!("{:>3}  {legend}", line.row));
            if let Some(legend) = legend.filter(|legend| reported.insert(legend.clone())) {
                writeln!(f, "{legend}")?;
            }
        }
        Ok(())
    }
}

/// Formats a number with thousands separators: 1,234,567.
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
