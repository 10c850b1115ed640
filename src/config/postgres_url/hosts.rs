//! The servers of a URL: names, addresses and sockets, each with its port.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
};

use super::{FORM, env_value, plain};

/// Tried in turn where no host is given: Debian's socket, PostgreSQL's own, and TCP.
const DEFAULT_HOSTS: [&str; 3] = ["/var/run/postgresql", "/tmp", "localhost"];
const DEFAULT_PORT: u16 = 5432;

/// Limit of the list.
const MAX_HOSTS: usize = 32;

/// One server.
pub(super) struct Server {
    /// A name, an address without brackets, or the directory of a Unix socket.
    pub(super) host: String,
    pub(super) port: u16,
    /// Its name in errors.
    pub(super) name: String,
}

/// Combines the authority, the parameters `host`, `hostaddr` and `port`, which it removes, and the
/// environment. As in libpq, parameters override the authority.
pub(super) fn servers(
    authority: &str,
    values: &mut BTreeMap<&'static str, String>,
) -> Result<Vec<Server>, String> {
    let mut hosts = Vec::new();
    let mut ports = Vec::new();
    for piece in authority.split(',') {
        let (host, port) = host_and_port(piece)?;
        hosts.push(host);
        ports.push(port.to_owned());
    }
    let mut given = match values.remove("hostaddr") {
        // An address makes the name redundant.
        Some(addresses) => {
            values.remove("host");
            Some(all_addresses(addresses, "hostaddr")?)
        }
        None => values.remove("host"),
    };
    if given.is_none() && hosts == [""] {
        given = match env_value("PGHOSTADDR")? {
            Some(addresses) => Some(all_addresses(addresses, "PGHOSTADDR")?),
            None => env_value("PGHOST")?,
        };
    }
    // The value of a parameter must not be logged.
    let shown = given.is_none();
    if let Some(given) = given {
        hosts = given.split(',').map(str::to_owned).collect();
    }
    let ports_in_url = values.remove("port");
    let ports_elsewhere = match &ports_in_url {
        None if ports.iter().all(String::is_empty) => env_value("PGPORT")?,
        _ => None,
    };
    if let Some(given) = ports_in_url.or(ports_elsewhere) {
        ports = given.split(',').map(str::to_owned).collect();
    }
    if ports.len() > 1 && ports.len() != hosts.len() || hosts.len() > MAX_HOSTS {
        return Err(format!("one port (PGPORT), or one for each of at most {MAX_HOSTS} hosts"));
    }

    let mut servers = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        let port = port(ports.get(index).unwrap_or(&ports[0]))?;
        let hosts = if host.is_empty() { &DEFAULT_HOSTS[..] } else { &[host.as_str()] };
        for host in hosts {
            check_host(host)?;
            let name = match host.contains(':') {
                _ if !shown => format!("server {}", servers.len() + 1),
                true => format!("[{host}]:{port}"),
                false => format!("{host}:{port}"),
            };
            servers.push(Server { host: (*host).to_owned(), port, name });
        }
    }
    Ok(servers)
}

fn all_addresses(list: String, name: &str) -> Result<String, String> {
    if list.split(',').all(|address| address.parse::<IpAddr>().is_ok()) {
        return Ok(list);
    }
    Err(format!("IP addresses for {name}"))
}

fn host_and_port(piece: &str) -> Result<(String, &str), String> {
    let (host, port) = match piece.strip_prefix('[') {
        Some(bracketed) => {
            let (host, rest) = bracketed.split_once(']').ok_or(FORM)?;
            let host = plain(host, "the host")?;
            if !is_ipv6(&host) {
                return Err(FORM.to_owned());
            }
            let port = rest.strip_prefix(':').or(rest.is_empty().then_some("")).ok_or(FORM)?;
            (host, port)
        }
        None => {
            let (host, port) = piece.split_once(':').unwrap_or((piece, ""));
            (plain(host, "the host")?, port)
        }
    };
    if port.contains(':') {
        return Err(FORM.to_owned());
    }
    Ok((host, port))
}

/// Accepts a scope, as in `fe80::1%eth0`, which the system checks.
fn is_ipv6(host: &str) -> bool {
    let (address, _) = host.split_once('%').unwrap_or((host, ""));
    address.parse::<Ipv6Addr>().is_ok()
}

fn check_host(host: &str) -> Result<(), String> {
    let name = |c: char| c.is_alphanumeric() || "-._".contains(c);
    if host.starts_with('/') || is_ipv6(host) || host.chars().all(name) {
        return Ok(());
    }
    Err(FORM.to_owned())
}

fn port(text: &str) -> Result<u16, String> {
    if text.is_empty() {
        return Ok(DEFAULT_PORT);
    }
    match text.parse() {
        Ok(port @ 1..) => Ok(port),
        _ => Err("a port from 1 to 65535 (port, PGPORT)".to_owned()),
    }
}
