//! The settings of the server: every flag and environment variable, parsed and checked before any
//! socket opens.
//!
//! Depends on nothing of ours.

use std::{fmt, path::PathBuf, str::FromStr};

/// Where orders are kept. Neither `Debug` nor `Display` shows a password.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseUrl {
    /// `sqlite://PATH`: a database file of this process alone.
    SqliteFile(PathBuf),
    /// `sqlite::memory:`: lost when the process ends.
    SqliteMemory,
    /// `postgres://…`: a server that many replicas share. The whole URL, with its password.
    Postgres(String),
}

impl DatabaseUrl {
    /// `sqlite` or `postgres`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::SqliteFile(_) | Self::SqliteMemory => "sqlite",
            Self::Postgres(_) => "postgres",
        }
    }
}

impl FromStr for DatabaseUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        if text == "sqlite::memory:" {
            return Ok(Self::SqliteMemory);
        }
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Self::Postgres(text.to_owned()));
        }
        match text.strip_prefix("sqlite://") {
            Some(path) if !path.is_empty() && !path.contains('?') => {
                Ok(Self::SqliteFile(path.into()))
            }
            _ => Err("sqlite://PATH, sqlite::memory: or postgres://USER:PASSWORD@HOST/DATABASE"),
        }
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SqliteFile(path) => write!(f, "sqlite://{}", path.display()),
            Self::SqliteMemory => f.write_str("sqlite::memory:"),
            Self::Postgres(url) => f.write_str(&without_password(url)),
        }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The URL with whatever could be a password replaced by `***`: all between the user's colon and the
/// last `@` of the authority, and every query parameter's value, since `password=` may stand there.
fn without_password(url: &str) -> String {
    let (url, query) = url.split_once('?').map_or((url, None), |(url, query)| (url, Some(query)));
    let Some((scheme, rest)) = url.split_once("://") else { return "***".to_owned() };
    let shown = match rest.rsplit_once('@') {
        Some((user, host)) => {
            let user =
                user.split_once(':').map_or(user.to_owned(), |(user, _)| format!("{user}:***"));
            format!("{scheme}://{user}@{host}")
        }
        None => format!("{scheme}://{rest}"),
    };
    let Some(query) = query else { return shown };
    let names: Vec<_> = query
        .split('&')
        .map(|pair| {
            pair.split_once('=').map_or("***".to_owned(), |(name, _)| format!("{name}=***"))
        })
        .collect();
    format!("{shown}?{}", names.join("&"))
}
