//! Standard error of a handler becomes log lines: bounded in length and in rate.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::ChildStderr;
use tracing::{info, warn};

/// The longest part of a line that is logged, in bytes.
const MAX_LINE_BYTES: usize = 4 * 1024;

/// The most lines that are logged in one interval. The others are counted.
const MAX_LINES: u32 = 100;
const INTERVAL: Duration = Duration::from_secs(1);

/// The projector for which a process works at the moment, or last did.
#[derive(Debug, Clone, Default)]
pub(super) struct CurrentProjector(Arc<Mutex<String>>);

impl CurrentProjector {
    pub(super) fn set(&self, name: &str) {
        let mut current = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        name.clone_into(&mut current);
    }

    fn get(&self) -> String {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }
}

/// Logs the lines until standard error is closed.
pub(super) async fn log_lines(stderr: ChildStderr, current: CurrentProjector) {
    let mut reader = BufReader::new(stderr);
    let mut limit = RateLimit { began: Instant::now(), lines: 0, dropped: 0 };
    while let Some(line) = next_line(&mut reader).await {
        let projector = current.get();
        let (may_log, dropped) = limit.count(Instant::now());
        if dropped > 0 {
            warn!(projector, dropped, "the handler wrote more log lines than are shown");
        }
        if may_log && !line.is_empty() {
            info!(projector, "handler: {line}");
        }
    }
    if limit.dropped > 0 {
        let (projector, dropped) = (current.get(), limit.dropped);
        warn!(projector, dropped, "the handler wrote more log lines than are shown");
    }
}

/// The next line, truncated. `None` at the end.
async fn next_line(reader: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    let mut is_first = true;
    loop {
        let mut part = Vec::new();
        let read = reader.take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut part).await;
        let length = read.unwrap_or(0);
        if length == 0 && is_first {
            return None;
        }
        let is_end = length < MAX_LINE_BYTES || part.ends_with(b"\n");
        if is_first {
            line = part;
        }
        is_first = false;
        if is_end {
            break;
        }
    }
    let text = String::from_utf8_lossy(&line);
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    let text: String = text.chars().map(visible).collect();
    Some(text.trim_end().to_owned())
}

struct RateLimit {
    began: Instant,
    lines: u32,
    dropped: u64,
}

impl RateLimit {
    /// Counts a line. Returns whether it may be logged, and how many lines the last interval
    /// dropped.
    fn count(&mut self, now: Instant) -> (bool, u64) {
        let mut dropped = 0;
        if now.duration_since(self.began) >= INTERVAL {
            dropped = self.dropped;
            *self = RateLimit { began: now, lines: 0, dropped: 0 };
        }
        self.lines += 1;
        let may_log = self.lines <= MAX_LINES;
        self.dropped += u64::from(!may_log);
        (may_log, dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_long_line_is_truncated_and_the_next_line_is_whole() {
        let text = format!("{}\nnext\u{7}\nlast", "x".repeat(3 * MAX_LINE_BYTES));
        let mut reader = BufReader::new(text.as_bytes());
        let mut lines = Vec::new();
        while let Some(line) = next_line(&mut reader).await {
            lines.push(line);
        }
        assert_eq!(lines, ["x".repeat(MAX_LINE_BYTES), "next".into(), "last".into()]);
    }

    #[test]
    fn lines_above_the_rate_are_dropped_and_counted_in_the_next_interval() {
        let began = Instant::now();
        let mut limit = RateLimit { began, lines: 0, dropped: 0 };
        let logged = (0..MAX_LINES + 7).filter(|_| limit.count(began).0).count();
        assert_eq!(logged, MAX_LINES as usize);
        assert_eq!(limit.count(began + INTERVAL), (true, 7));
        assert_eq!(limit.count(began + INTERVAL), (true, 0));
    }
}
