//! The form and the level of the log lines.

use std::io::stderr;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Starts logging to stderr. `filter` is the value of `RUST_LOG`: a level such as `debug`, or one for
/// each target such as `info,order_service::store=debug`; without it the level is `info`.
///
/// # Errors
/// One line that names the value, if it is no filter.
pub fn start(format: LogFormat, filter: Option<String>) -> Result<(), String> {
    let text = filter.filter(|text| !text.is_empty()).unwrap_or_else(|| "info".to_owned());
    let filter = EnvFilter::builder()
        .parse(&text)
        .map_err(|_| format!("RUST_LOG {text:?}: expected a level such as info or debug"))?;
    let lines = tracing_subscriber::fmt().with_writer(stderr).with_env_filter(filter);
    match format {
        LogFormat::Text => lines.with_ansi(false).init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
    Ok(())
}
