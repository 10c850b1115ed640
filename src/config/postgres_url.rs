//! The URL of PostgreSQL servers, in libpq's forms (PostgreSQL, "Connection URIs"). What is not
//! understood in full is refused, because an ignored parameter may be the one that asks for TLS.
//!
//! Depends on sqlx for the options of one connection. It parses before the log starts, because
//! sqlx logs values that must not be seen, such as a malformed line of a password file.

use std::{collections::BTreeMap, env, fmt, fs, os::unix::fs::PermissionsExt as _, path::Path};

use sqlx::postgres::{PgConnectOptions, PgSslMode};

use self::{hosts::Server, parameters::name_of};
use super::database_url::without_password;
use crate::usage::single_line;

mod hosts;
mod parameters;

/// The servers of one database, which a login tries in turn. Neither `Debug` nor `Display` shows
/// the value of a parameter or a password.
#[derive(Clone)]
pub struct PostgresUrl {
    servers: Vec<PostgresServer>,
    session: TargetSession,
    shown: String,
}

/// One server of a URL.
#[derive(Clone)]
pub struct PostgresServer {
    /// How an error names it: host and port, or its place in the list.
    pub name: String,
    /// How to connect to it.
    pub options: PgConnectOptions,
}

/// Which servers a login accepts: libpq's `target_session_attrs`, less those that only read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetSession {
    /// Any server that accepts the login.
    Any,
    /// One whose transactions may write.
    ReadWrite,
    /// One that is not in recovery.
    Primary,
}

impl PostgresUrl {
    /// Parses a URL; variables of libpq's in the environment fill in what it leaves out.
    ///
    /// # Errors
    /// What is expected, without any value.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        Parts::split(text)?.resolve(without_password(text))
    }

    /// The servers in the order of the URL, at least one.
    pub fn servers(&self) -> &[PostgresServer] {
        &self.servers
    }

    /// Which of them a login accepts.
    pub fn target_session(&self) -> TargetSession {
        self.session
    }
}

impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for PostgresServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

const FORM: &str = "postgres://USER:PASSWORD@HOST:PORT/DATABASE?PARAMETER=VALUE, each part \
                    percent-encoded, with [::1] for IPv6 and commas between several hosts";

/// The parts of a URL, decoded.
struct Parts<'u> {
    hosts: &'u str,
    /// By their libpq names; user, password and database among them.
    values: BTreeMap<&'static str, String>,
    /// Each given by `options[NAME]`.
    settings: Vec<(String, String)>,
}

impl<'u> Parts<'u> {
    fn split(text: &'u str) -> Result<Self, String> {
        let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
        // An `@` behind the authority ends a password that holds `/` or `?` unencoded.
        let misread = text.contains('#') || database.contains('@');
        if misread {
            return Err(FORM.to_owned());
        }
        let (login, hosts) = match authority.rsplit_once('@') {
            Some((login, hosts)) => (login, hosts),
            None => ("", authority),
        };
        let (user, password) = match login.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (login, None),
        };
        let mut values = BTreeMap::new();
        if !user.is_empty() {
            values.insert("user", plain(user, "the user")?);
        }
        if let Some(password) = password {
            values.insert("password", decode(password).ok_or(FORM)?);
        }
        if !database.is_empty() {
            values.insert("dbname", plain(database, "the database")?);
        }
        let mut parts = Self { hosts, values, settings: Vec::new() };
        parts.read_query(query)?;
        Ok(parts)
    }

    fn read_query(&mut self, query: &str) -> Result<(), String> {
        let mut given = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let Some((name, value)) = pair.split_once('=') else {
                return Err("parameters of the form NAME=VALUE".to_owned());
            };
            let name = decode(name).ok_or(FORM)?;
            let setting = name.strip_prefix("options[");
            let known = match setting {
                Some(_) => "options",
                // An `@` may end a password that holds `?` unencoded: nothing of it is quoted.
                None if query.contains('@') => name_of(&name).map_err(|_| FORM)?,
                None => name_of(&name)?,
            };
            let value = match known {
                "password" => decode(value).ok_or(FORM)?,
                _ => plain(value, known)?,
            };
            if let Some(setting) = setting {
                let setting = setting.strip_suffix(']').filter(|setting| !setting.is_empty());
                let setting = setting.ok_or("options[NAME]=VALUE")?;
                self.settings.push((setting.to_owned(), value));
            } else if given.contains(&known) {
                return Err(format!("{known} once"));
            } else {
                given.push(known);
                self.values.insert(known, value);
            }
        }
        Ok(())
    }

    fn resolve(mut self, shown: String) -> Result<PostgresUrl, String> {
        for (name, variable) in [
            ("user", "PGUSER"),
            ("password", "PGPASSWORD"),
            ("dbname", "PGDATABASE"),
            ("sslmode", "PGSSLMODE"),
            ("target_session_attrs", "PGTARGETSESSIONATTRS"),
        ] {
            if !self.values.contains_key(name)
                && let Some(value) = variable_of(variable)?
            {
                self.values.insert(name, value);
            }
        }
        parameters::check_environment()?;
        if !self.values.contains_key("password") {
            check_password_file()?;
        }
        let session = match self.values.remove("target_session_attrs").as_deref() {
            None | Some("any") => TargetSession::Any,
            Some("read-write") => TargetSession::ReadWrite,
            Some("primary") => TargetSession::Primary,
            Some(_) => {
                return Err("any, read-write or primary for target_session_attrs \
                            (PGTARGETSESSIONATTRS): orders are written"
                    .to_owned());
            }
        };
        let tls = self.tls()?;
        let servers = hosts::servers(self.hosts, &mut self.values)?;
        let servers = servers.into_iter().map(|server| self.options(server, tls));
        Ok(PostgresUrl { servers: servers.collect::<Result<_, _>>()?, session, shown })
    }

    /// The mode, and what else has to be known of TLS before there is a server.
    fn tls(&mut self) -> Result<PgSslMode, String> {
        const EXPECTED: &str = "disable, allow, prefer, require, verify-ca or verify-full for \
                                sslmode (PGSSLMODE)";
        let mode = self.values.remove("sslmode");
        let mode: Option<PgSslMode> =
            mode.map(|mode| mode.parse().map_err(|_| EXPECTED)).transpose()?;
        if self.values.contains_key("sslcert") != self.values.contains_key("sslkey") {
            return Err("sslcert and sslkey together".to_owned());
        }
        let system = self.values.get("sslrootcert").is_some_and(|file| file == "system");
        match mode {
            // The system's authorities are accepted in any case.
            None | Some(PgSslMode::VerifyFull) if system => {
                self.values.remove("sslrootcert");
                Ok(PgSslMode::VerifyFull)
            }
            _ if system => Err("sslmode=verify-full with sslrootcert=system".to_owned()),
            // As in libpq: whoever names an authority wants it asked.
            Some(PgSslMode::Require) if self.values.contains_key("sslrootcert") => {
                Ok(PgSslMode::VerifyCa)
            }
            mode => Ok(mode.unwrap_or_default()),
        }
    }

    /// By a URL of its own for each server, which is sqlx's one way to look into a password file.
    fn options(&self, server: Server, tls: PgSslMode) -> Result<PostgresServer, String> {
        let Server { host, port, name } = server;
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("host", &host).append_pair("port", &port.to_string());
        query.extend_pairs(&self.values);
        for (setting, value) in &self.settings {
            query.append_pair(&format!("options[{setting}]"), value);
        }
        let options: PgConnectOptions =
            format!("postgres:///?{}", query.finish()).parse().map_err(|_| {
                // Only one of those that are passed on can be malformed.
                "a whole number for statement-cache-capacity".to_owned()
            })?;
        // As in libpq: a socket is of this machine and speaks no TLS.
        let tls = if options.get_socket().is_some() { PgSslMode::Disable } else { tls };
        Ok(PostgresServer { name, options: options.ssl_mode(tls) })
    }
}

/// What stands for something else than a password holds no control character.
fn plain(text: &str, part: &str) -> Result<String, String> {
    let text = decode(text).ok_or(FORM)?;
    if text.contains(char::is_control) {
        return Err(format!("no control character in {part}"));
    }
    Ok(text)
}

/// As libpq: a `+` is a `+`, and NUL is refused.
fn decode(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let byte = if byte == b'%' {
            let mut digit = || (bytes.next()? as char).to_digit(16);
            u8::try_from(digit()? * 16 + digit()?).ok()?
        } else {
            byte
        };
        decoded.push(byte);
    }
    String::from_utf8(decoded).ok().filter(|text| !text.contains('\0'))
}

/// A variable of the environment that is set and not empty.
fn variable_of(name: &str) -> Result<Option<String>, String> {
    let Some(value) = env::var_os(name) else { return Ok(None) };
    let value = value.to_str().and_then(|value| single_line(value).ok());
    let value = value.ok_or_else(|| format!("{name} in UTF-8 without control characters"))?;
    Ok(Some(value.to_owned()).filter(|value| !value.is_empty()))
}

/// sqlx passes over a file that others may read, and says so where nobody sees it.
fn check_password_file() -> Result<(), String> {
    let Some(path) = env::var_os("PGPASSFILE").filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    let mode = fs::metadata(Path::new(&path)).map(|file| file.permissions().mode());
    match mode {
        Ok(mode) if mode & 0o077 == 0 => Ok(()),
        _ => Err("PGPASSFILE to name a file that its owner alone may use".to_owned()),
    }
}
