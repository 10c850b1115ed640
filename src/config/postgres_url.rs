//! The URL of PostgreSQL servers, in libpq's forms (PostgreSQL, "Connection URIs"). An unknown
//! parameter is refused, because it may be the one that asks for TLS.
//!
//! Depends on sqlx for the options of one connection. URLs must be parsed before the log starts: sqlx
//! logs secrets while it parses, such as a malformed line of a password file.

use std::{collections::BTreeMap, env, fmt, fs, os::unix::fs::PermissionsExt as _, path::Path};

use sqlx::postgres::{PgConnectOptions, PgSslMode};

use self::{hosts::Server, parameters::name_of};
use super::database_url::without_password;
use crate::usage::single_line;

mod hosts;
mod parameters;

/// The servers of one database. Neither `Debug` nor `Display` shows a password or the value of a
/// parameter.
#[derive(Clone)]
pub struct PostgresUrl {
    servers: Vec<PostgresServer>,
    session: TargetSession,
    shown: String,
}

/// One server of a URL.
#[derive(Clone)]
pub struct PostgresServer {
    /// Its name in errors: host and port, or its number if a parameter gave the host.
    pub name: String,
    /// The options of a connection to it.
    pub options: PgConnectOptions,
}

/// The servers that a login accepts: the values of libpq's `target_session_attrs` that permit
/// writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetSession {
    /// Any server that accepts the login.
    Any,
    /// A server whose transactions may write.
    ReadWrite,
    /// A server that is not in recovery.
    Primary,
}

impl PostgresUrl {
    /// Parses a URL. libpq's environment variables apply to parts that the URL leaves out.
    ///
    /// # Errors
    /// The expected form; never a value.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        Parts::split(text)?.resolve(without_password(text))
    }

    /// The servers in the order of the URL, at least one.
    pub fn servers(&self) -> &[PostgresServer] {
        &self.servers
    }

    /// The servers that a login accepts.
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
    /// Names and values of `options[NAME]`.
    settings: Vec<(String, String)>,
}

impl<'u> Parts<'u> {
    fn split(text: &'u str) -> Result<Self, String> {
        let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
        // An `@` after the authority is a sign of a password with an unencoded `/`.
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
                // An `@` is a sign of a password with an unencoded `?`, which must not be quoted.
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
                && let Some(value) = env_value(variable)?
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

    /// Checks the TLS parameters and returns the mode.
    fn tls(&mut self) -> Result<PgSslMode, String> {
        const EXPECTED: &str = "disable, allow, prefer, require, verify-ca or verify-full for \
                                sslmode (PGSSLMODE)";
        let mode = self.values.remove("sslmode");
        let mode: Option<PgSslMode> =
            mode.map(|mode| mode.parse().map_err(|_| EXPECTED)).transpose()?;
        // sqlx reads these variables, which may hold a whole certificate.
        let has = |name: &str, variable: &str| {
            let set = env::var_os(variable).is_some_and(|value| !value.is_empty());
            set || self.values.contains_key(name)
        };
        let has_root = has("sslrootcert", "PGSSLROOTCERT");
        if has("sslcert", "PGSSLCERT") != has("sslkey", "PGSSLKEY") {
            return Err("sslcert and sslkey together".to_owned());
        }
        let system = self.values.get("sslrootcert").is_some_and(|file| file == "system");
        match mode {
            // sqlx always accepts the authorities of the system.
            None | Some(PgSslMode::VerifyFull) if system => {
                self.values.remove("sslrootcert");
                Ok(PgSslMode::VerifyFull)
            }
            _ if system => Err("sslmode=verify-full with sslrootcert=system".to_owned()),
            // As in libpq, a root certificate makes `require` verify the chain.
            Some(PgSslMode::Require) if has_root => Ok(PgSslMode::VerifyCa),
            mode => Ok(mode.unwrap_or_default()),
        }
    }

    /// Makes a URL for one server, because sqlx reads a password file only for a URL.
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
                // Every other value has been checked.
                "a whole number for statement-cache-capacity".to_owned()
            })?;
        // As in libpq, a Unix socket has no TLS.
        let tls = if options.get_socket().is_some() { PgSslMode::Disable } else { tls };
        Ok(PostgresServer { name, options: options.ssl_mode(tls) })
    }
}

/// Decodes a part other than a password, which may not contain control characters.
fn plain(text: &str, part: &str) -> Result<String, String> {
    let text = decode(text).ok_or(FORM)?;
    if text.contains(char::is_control) {
        return Err(format!("no control character in {part}"));
    }
    Ok(text)
}

/// Decodes as libpq does: `+` stays, NUL and incomplete escapes are refused.
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

/// Reads an environment variable, unless it is empty.
fn env_value(name: &str) -> Result<Option<String>, String> {
    let Some(value) = env::var_os(name) else { return Ok(None) };
    let value = value.to_str().and_then(|value| single_line(value).ok());
    let value = value.ok_or_else(|| format!("{name} in UTF-8 without control characters"))?;
    Ok(Some(value.to_owned()).filter(|value| !value.is_empty()))
}

/// sqlx ignores a file that others may read, with a warning that is lost before the log starts.
fn check_password_file() -> Result<(), String> {
    let Some(path) = env::var_os("PGPASSFILE").filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    let mode = fs::metadata(Path::new(&path)).map(|file| file.permissions().mode());
    match mode {
        Ok(mode) if mode & 0o077 == 0 => Ok(()),
        _ => Err("PGPASSFILE to be the path of a file that only its owner may access".to_owned()),
    }
}
