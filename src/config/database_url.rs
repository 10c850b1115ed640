//! The URL of the database, which is never shown with its password.

use std::{fmt, path::PathBuf, str::FromStr};

use super::PostgresUrl;
use crate::usage::single_line;

/// Where orders are kept. Neither `Debug` nor `Display` shows a password.
#[derive(Clone)]
pub enum DatabaseUrl {
    /// `sqlite://PATH`: a database file of this process alone.
    SqliteFile(PathBuf),
    /// `sqlite::memory:`: lost when the process ends.
    SqliteMemory,
    /// `postgres://…`: one or more servers that many replicas share.
    Postgres(PostgresUrl),
}

impl DatabaseUrl {
    /// `sqlite` or `postgres`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::SqliteFile(_) | Self::SqliteMemory => "sqlite",
            Self::Postgres(_) => "postgres",
        }
    }

    /// How many servers a login may try.
    pub fn servers(&self) -> usize {
        match self {
            Self::SqliteFile(_) | Self::SqliteMemory => 0,
            Self::Postgres(url) => url.servers().len(),
        }
    }
}

impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = single_line(text)?;
        // SQLite takes the two other names for memory as well, of each connection for itself.
        if ["sqlite::memory:", "sqlite://:memory:", "sqlite://file::memory:"].contains(&text) {
            return Ok(Self::SqliteMemory);
        }
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return PostgresUrl::parse(text).map(Self::Postgres);
        }
        match text.strip_prefix("sqlite://") {
            Some(path) if path.starts_with("file:") => {
                Err("sqlite://PATH or sqlite::memory: instead of SQLite's file: URI, or \
                     postgres://USER:PASSWORD@HOST/DATABASE"
                    .to_owned())
            }
            Some(path) if !path.is_empty() && !path.contains('?') => {
                Ok(Self::SqliteFile(path.into()))
            }
            _ => Err("sqlite://PATH, sqlite::memory: or postgres://USER:PASSWORD@HOST/DATABASE"
                .to_owned()),
        }
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SqliteFile(path) => write!(f, "sqlite://{}", path.display()),
            Self::SqliteMemory => f.write_str("sqlite::memory:"),
            Self::Postgres(url) => fmt::Display::fmt(url, f),
        }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text with whatever could be a password replaced by `***`, whether it is a URL or a mistake: all
/// from the user's name to the last `@`, what stands where a port should, and every parameter's value.
pub(super) fn without_password(text: &str) -> String {
    const HIDDEN: &str = "***";
    let Some((scheme, rest)) = text.split_once("://") else {
        // `postgres//u:secret` is a slip, too.
        let path = text.strip_prefix("sqlite:").or(text.strip_prefix("file:")).unwrap_or(text);
        let plain = !path.contains(['@', '=', ':']) || text.starts_with("sqlite::memory:");
        return if plain { text.to_owned() } else { HIDDEN.to_owned() };
    };
    // The last, since a password may hold what it should have encoded.
    let (user, location) = match rest.rsplit_once('@') {
        Some((user, location)) => {
            let name =
                user.split_once([':', '/', '?', '#']).map(|(name, _)| format!("{name}:{HIDDEN}"));
            (format!("{}@", name.unwrap_or_else(|| user.to_owned())), location)
        }
        None => (String::new(), rest),
    };
    let (location, parameters) = match location.split_once(['?', '#']) {
        Some((location, parameters)) => (location, Some(parameters)),
        None => (location, None),
    };
    let authority = location.split('/').next().unwrap_or_default();
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    let well_formed = authority.split(',').all(|host| {
        let port = host.rsplit_once(':').filter(|_| !host.ends_with(']'));
        port.is_none_or(|(_, port)| is_port(port))
    });
    let location = match authority.split_once(':') {
        Some((host, _)) if !well_formed => {
            format!("{host}:{HIDDEN}{}", &location[authority.len()..])
        }
        _ => location.to_owned(),
    };
    let Some(parameters) = parameters else { return format!("{scheme}://{user}{location}") };
    let names: Vec<_> = parameters
        .split('&')
        .map(|pair| {
            pair.split_once('=').map_or(HIDDEN.to_owned(), |(name, _)| format!("{name}={HIDDEN}"))
        })
        .collect();
    format!("{scheme}://{user}{location}?{}", names.join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_hidden_wherever_it_stands() {
        for (given, shown) in [
            ("postgres://u:s3cret@host:5432/db", "postgres://u:***@host:5432/db"),
            ("postgres://u:s3@c/r?et#@host/db", "postgres://u:***@host/db"),
            ("postgres://u:s3?cret@host/db?a=1", "postgres://u:***@host/db?a=***"),
            ("postgres://host/db?password=s3cret", "postgres://host/db?password=***"),
            ("postgres://host/db?password=s3@cret", "postgres://host:***@cret"),
            ("postgres://u:s3cret", "postgres://u:***"),
            ("postgres://u:s3:cret/db", "postgres://u:***/db"),
            ("postgres://[::1]:5432/db", "postgres://[::1]:5432/db"),
            ("postgres://[::1]/db", "postgres://[::1]/db"),
            ("postgres://u:s3cret@a:1,[::1]:2,c/db", "postgres://u:***@a:1,[::1]:2,c/db"),
            ("postgres://u:s3,cret/db", "postgres://u:***/db"),
            ("postgres:///db?host=/dir", "postgres:///db?host=***"),
            ("postgres://u@host/db", "postgres://u@host/db"),
            ("postgres://host/db#s3cret", "postgres://host/db?***"),
            ("host=localhost password=s3cret", "***"),
            ("postgres//u:s3cret", "***"),
            ("postgres:u:s3cret", "***"),
            ("sqlite:orders.db", "sqlite:orders.db"),
            ("u:s3cret@host/db", "***"),
            ("orders.db", "orders.db"),
        ] {
            assert_eq!(without_password(given), shown, "{given}");
        }
    }
}
