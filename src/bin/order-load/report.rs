//! What came of a run: a table to read and a JSON document to compute with.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use serde_json::{Map, Value, json};

use crate::{
    args::Args,
    audit::{Audit, Kind, LISTED, Problem},
    recorder::{QUANTILES, Record},
};

/// The whole run.
#[derive(Debug)]
pub struct Report<'a> {
    pub args: &'a Args,
    pub seed: u64,
    /// Of each phase.
    pub records: Vec<Record>,
    pub audit: Option<Audit>,
    /// Whether it was ended before its time.
    pub interrupted: bool,
}

impl Report<'_> {
    /// Whether no more orders failed or went unsent than may, and the audit found nothing.
    pub fn passed(&self) -> bool {
        let failures: u64 = self.records.iter().map(|r| r.failures() + r.unsent).sum();
        failures <= self.args.max_failures && self.audit.as_ref().is_none_or(Audit::passed)
    }

    /// The phases, the processes that served them, what was said of failures, and the audit.
    pub fn table(&self) -> String {
        let mut text = String::new();
        if self.interrupted {
            text.push_str("ended early; the figures are of what was sent until then\n");
        }
        text.push_str(&aligned(&self.phase_rows()));
        let processes = self.process_rows();
        if processes.len() > 1 {
            text.push('\n');
            text.push_str(&aligned(&processes));
        }
        for (phase, record) in self.args.phases.0.iter().zip(&self.records) {
            for (code, failed) in &record.failed {
                let (name, first) = (&phase.name, &failed.first);
                let _ = writeln!(text, "{name}: {code}, the first of {}: {first}", failed.count);
            }
        }
        if let Some(audit) = &self.audit {
            text.push_str(&audit_text(audit));
        }
        text
    }

    fn phase_rows(&self) -> Vec<Vec<String>> {
        let mut head: Vec<_> =
            ["phase", "sent", "ok", "retried", "unsent", "failed"].map(str::to_owned).into();
        head.extend(QUANTILES.map(|(name, _)| name.to_owned()));
        head.push("max".to_owned());
        let mut rows = vec![head];
        for (phase, record) in self.args.phases.0.iter().zip(&self.records) {
            let failed: Vec<_> = record
                .failed
                .iter()
                .map(|(code, failed)| format!("{code} {}", failed.count))
                .collect();
            let failed = if failed.is_empty() { "0".to_owned() } else { failed.join(" ") };
            let mut row = vec![phase.name.clone()];
            row.extend(
                [record.sent, record.ok, record.retried, record.unsent].map(|n| n.to_string()),
            );
            row.push(failed);
            let latency =
                |time: Duration| if record.ok > 0 { seconds(time) } else { "-".to_owned() };
            row.extend(QUANTILES.map(|(_, quantile)| latency(record.latency(quantile))));
            row.push(latency(record.longest()));
            rows.push(row);
        }
        rows
    }

    /// Each process's share of the acknowledged orders of each phase.
    fn process_rows(&self) -> Vec<Vec<String>> {
        let processes: BTreeSet<_> = self
            .records
            .iter()
            .flat_map(|record| &record.served_by)
            .map(|(name, _)| name.as_bytes())
            .collect();
        let mut rows = vec![vec![format!("served by ({})", processes.len())]];
        rows[0].extend(self.args.phases.0.iter().map(|phase| phase.name.clone()));
        for process in processes {
            let mut row = vec![String::from_utf8_lossy(process).into_owned()];
            for record in &self.records {
                let served = record.served_by.iter().find(|(name, _)| name.as_bytes() == process);
                #[allow(clippy::cast_precision_loss, reason = "for the eye")]
                let share = served.map(|(_, count)| *count as f64 / record.ok as f64 * 100.0);
                row.push(share.map_or("-".to_owned(), |share| format!("{share:.1} %")));
            }
            rows.push(row);
        }
        rows
    }

    /// The whole report on one line.
    pub fn json(&self) -> Value {
        let phases: Vec<_> = self
            .args
            .phases
            .0
            .iter()
            .zip(&self.records)
            .map(|(phase, record)| {
                let counted = |name: String, count: u64| (name, json!(count));
                let failed: Map<_, _> = record
                    .failed
                    .iter()
                    .map(|(code, f)| counted(code.to_string(), f.count))
                    .collect();
                let served_by: Map<_, _> = record
                    .served_by
                    .iter()
                    .map(|(name, count)| {
                        counted(String::from_utf8_lossy(name.as_bytes()).into_owned(), *count)
                    })
                    .collect();
                let mut latency: Map<_, _> = QUANTILES
                    .iter()
                    .map(|(name, q)| ((*name).to_owned(), json!(record.latency(*q).as_secs_f64())))
                    .collect();
                latency.insert("max".to_owned(), json!(record.longest().as_secs_f64()));
                json!({
                    "phase": phase.name,
                    "duration_seconds": phase.duration.as_secs_f64(),
                    "rate": phase.rate,
                    "sent": record.sent,
                    "ok": record.ok,
                    "retried": record.retried,
                    "unsent": record.unsent,
                    "failed": failed,
                    "latency_seconds": latency,
                    "served_by": served_by,
                })
            })
            .collect();
        let mut document = json!({
            "phases": phases,
            "seed": self.seed,
            "interrupted": self.interrupted,
            "passed": self.passed(),
        });
        if let Some(audit) = &self.audit {
            let mut found = json!({
                "acknowledged": audit.acknowledged,
                "unacknowledged_stored": audit.unacknowledged_stored,
                "passed": audit.passed(),
            });
            for kind in Kind::ALL {
                found[kind.to_string()] = json!(audit.count(kind));
            }
            let listed = audit.problems.iter().take(LISTED).map(Problem::line);
            found["problems"] = listed.collect();
            document["audit"] = found;
        }
        document
    }
}

fn audit_text(audit: &Audit) -> String {
    let mut text = format!("\naudit: {} acknowledged", audit.acknowledged);
    for kind in Kind::ALL {
        let _ = write!(text, ", {} {kind}", audit.count(kind));
    }
    let _ = writeln!(text, "; {} stored without an acknowledgement", audit.unacknowledged_stored);
    for problem in audit.problems.iter().take(LISTED) {
        let _ = writeln!(text, "  {}", problem.line());
    }
    if audit.problems.len() > LISTED {
        let _ = writeln!(text, "  and {} more", audit.problems.len() - LISTED);
    }
    text
}

/// Columns two spaces apart, the first to the left, all others to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            let _ = match column {
                0 => write!(line, "{cell:<width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Three digits, in the unit that fits.
pub fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s => (s * 1e6, "µs"),
    };
    let digits = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {unit}")
}
