//! The form and the level of the log lines, and the thread that writes them.

use std::{
    io::{self, stderr},
    time::Duration,
};

use tracing::{
    Subscriber,
    level_filters::{LevelFilter, STATIC_MAX_LEVEL},
};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter, util::SubscriberInitExt as _};

use self::writer::LogWriter;
use crate::{config::LogFormat, metrics::LogMetrics};

pub mod writer;

/// Without the driver's lines of what the database server says to each connection: the store tells
/// an outage once.
const DEFAULT: [&str; 2] = ["info", "sqlx::postgres::notice=off"];

/// Limit of the flush when the process ends: stderr may be a pipe that nobody reads.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// The log of the process. On drop it flushes its last lines, for at most a second.
#[derive(Debug)]
#[must_use = "on drop it flushes its last lines"]
pub struct Log {
    writer: LogWriter,
    metrics: LogMetrics,
}

/// Why the log cannot start.
#[derive(Debug, thiserror::Error)]
pub enum NoLog {
    /// One line that names the value of `RUST_LOG`, which is no filter.
    #[error("{0}")]
    BadFilter(String),
    /// The writer's thread cannot be spawned.
    #[error("the log's thread cannot be spawned: {0}")]
    NoThread(#[from] io::Error),
}

impl Log {
    /// Starts logging to stderr; `filter` is the value of `RUST_LOG`, see [`subscriber`]. From then
    /// on only the log's thread may use stderr: it holds stderr's lock for as long as a write
    /// blocks.
    ///
    /// # Errors
    /// See [`NoLog`].
    pub fn start(format: LogFormat, filter: Option<&str>) -> Result<Self, NoLog> {
        let metrics = LogMetrics::new();
        let writer = LogWriter::start(stderr(), metrics.lines_dropped.clone())?;
        subscriber(format, filter, writer.clone()).map_err(NoLog::BadFilter)?.init();
        Ok(Self { writer, metrics })
    }

    /// The handles of the log's families.
    pub fn metrics(&self) -> LogMetrics {
        self.metrics.clone()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.writer.flush(FLUSH_LIMIT);
    }
}

/// What writes the log lines. `filter` is a level such as `debug`, or levels of targets such as
/// `order_service::store=debug`, or several with commas between. The level of all other targets is
/// `info` unless it is given.
///
/// # Errors
/// One line that names the value, if it is no filter.
pub fn subscriber<W>(
    format: LogFormat,
    filter: Option<&str>,
    writer: W,
) -> Result<Box<dyn Subscriber + Send + Sync>, String>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = read_filter(filter.unwrap_or_default())?;
    let lines = tracing_subscriber::fmt()
        .with_writer(writer)
        // They are reported with `eprintln!`, which panics if stderr is broken.
        .log_internal_errors(false)
        .with_env_filter(filter);
    Ok(match format {
        LogFormat::Text => Box::new(lines.with_ansi(false).finish()),
        LogFormat::Json => Box::new(lines.json().flatten_event(true).finish()),
    })
}

/// Stricter than the filter itself, which takes a misspelt level for the name of a target and then
/// silences all others, fatal errors too. A level that the build is without (`trace` of a release)
/// is taken for the nearest: the filter would write a warning of its own to stderr, in no log
/// format.
fn read_filter(text: &str) -> Result<EnvFilter, String> {
    let refused = || {
        format!(
            "RUST_LOG {text:?}: expected a level (off, error, warn, info, debug or trace) or \
             TARGET=LEVEL, several with commas between"
        )
    };
    let directives = text.split(',').map(str::trim).filter(|directive| !directive.is_empty());
    let mut all = Vec::new();
    let mut has_default = false;
    for directive in directives {
        let (target, level) = match directive.rsplit_once('=') {
            Some((target, level)) => (Some(target), level),
            None => (None, directive),
        };
        has_default |= target.is_none();
        let level = match level.parse::<LevelFilter>() {
            Ok(most) if !level.is_empty() => most.min(STATIC_MAX_LEVEL),
            _ => return Err(refused()),
        };
        all.push(target.map_or_else(|| level.to_string(), |target| format!("{target}={level}")));
    }
    if !has_default {
        all.splice(0..0, DEFAULT.map(str::to_owned));
    }
    EnvFilter::builder().parse(all.join(",")).map_err(|_| refused())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_levels_and_levels_of_targets() {
        for (text, most) in [
            ("", LevelFilter::INFO),
            (" warn ", LevelFilter::WARN),
            ("off", LevelFilter::OFF),
            ("DEBUG,", LevelFilter::DEBUG),
            ("hyper=debug", LevelFilter::DEBUG),
            ("error, order_service::store=trace", STATIC_MAX_LEVEL),
            // The others are not silenced by one that is.
            ("h2=off", LevelFilter::INFO),
        ] {
            let filter = read_filter(text).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(filter.max_level_hint(), Some(most), "{text}");
        }
    }

    #[test]
    fn what_could_silence_all_by_mistake_is_refused() {
        for text in ["inof", "order_service", "order_service=", "a=loud", "=", "info,inof", "[x"] {
            let line = read_filter(text).unwrap_err();
            assert!(line.contains("RUST_LOG") && line.contains(&format!("{text:?}")), "{line}");
        }
    }
}
