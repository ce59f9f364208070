//! Measures several lanes in turn, round by round. A change of the machine during the run then
//! affects all lanes.

use std::future::Future;
use std::time::{Duration, Instant};

use futures_util::future::LocalBoxFuture;

/// One measured variant. `T` is the result of one round.
pub struct Lane<'a, T> {
    name: String,
    run: Box<dyn FnMut() -> LocalBoxFuture<'a, anyhow::Result<T>> + 'a>,
}

/// The results of a lane, one for each round.
#[derive(Clone)]
pub struct Series<T> {
    pub name: String,
    pub rounds: Vec<T>,
}

/// A lane with this name; `run` measures one round.
pub fn lane<'a, T, F>(name: impl Into<String>, mut run: impl FnMut() -> F + 'a) -> Lane<'a, T>
where
    F: Future<Output = anyhow::Result<T>> + 'a,
{
    Lane { name: name.into(), run: Box::new(move || Box::pin(run())) }
}

/// Runs the lanes one after the other, for `rounds` rounds.
pub async fn in_turn<const N: usize, T>(
    rounds: usize,
    mut lanes: [Lane<'_, T>; N],
) -> anyhow::Result<[Series<T>; N]> {
    let mut series =
        lanes.each_ref().map(|lane| Series { name: lane.name.clone(), rounds: Vec::new() });
    for round in 1..=rounds {
        for (lane, series) in lanes.iter_mut().zip(&mut series) {
            let began = Instant::now();
            series
                .rounds
                .push((lane.run)().await.map_err(|error| error.context(lane.name.clone()))?);
            eprintln!(
                "  round {round} of {rounds}: {}, {:.1} s",
                lane.name,
                began.elapsed().as_secs_f32()
            );
        }
    }
    Ok(series)
}

impl<T> Series<T> {
    /// The series of one figure of each round.
    pub fn of(&self, figure: impl Fn(&T) -> f64) -> Series<f64> {
        Series { name: self.name.clone(), rounds: self.rounds.iter().map(figure).collect() }
    }
}

impl Series<f64> {
    pub fn median(&self) -> f64 {
        median(&self.rounds)
    }
}

pub fn per_second(count: u64, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}

pub fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 0 => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
        count => sorted[count / 2],
    }
}

/// Quantiles of the delays of one round, in milliseconds.
pub struct Quantiles {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

impl Quantiles {
    /// Uses the nearest rank: of ten values, the 99th percentile is the largest.
    pub fn of(delays: &[Duration]) -> Self {
        let values: Vec<f64> = delays.iter().map(|delay| delay.as_secs_f64() * 1e3).collect();
        let sorted = sorted(&values);
        let rank = |share: f64| match sorted.len() {
            0 => f64::NAN,
            count => sorted[((count as f64 * share).ceil() as usize).clamp(1, count) - 1],
        };
        Quantiles { p50: rank(0.5), p95: rank(0.95), p99: rank(0.99) }
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}
