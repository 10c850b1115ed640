//! The names of the URL's parameters, and the nearest known name for an unknown one.

use super::env_value;

/// Each accepted spelling, and libpq's name for it.
const KNOWN: [(&str, &str); 19] = [
    ("application_name", "application_name"),
    ("dbname", "dbname"),
    ("host", "host"),
    ("hostaddr", "hostaddr"),
    ("options", "options"),
    ("password", "password"),
    ("port", "port"),
    ("sslcert", "sslcert"),
    ("sslkey", "sslkey"),
    ("sslmode", "sslmode"),
    ("sslrootcert", "sslrootcert"),
    ("statement-cache-capacity", "statement-cache-capacity"),
    ("target_session_attrs", "target_session_attrs"),
    ("user", "user"),
    // sqlx's own spellings.
    ("ssl-ca", "sslrootcert"),
    ("ssl-cert", "sslcert"),
    ("ssl-key", "sslkey"),
    ("ssl-mode", "sslmode"),
    ("ssl-root-cert", "sslrootcert"),
];

/// Parameters of libpq and of other drivers whose nearest name is not a matter of spelling.
const FOREIGN: [(&str, &str); 12] = [
    ("ssl", "sslmode"),
    ("tls", "sslmode"),
    ("requiressl", "sslmode"),
    ("channel_binding", "sslmode"),
    ("require_auth", "sslmode"),
    ("gssencmode", "sslmode"),
    ("sslnegotiation", "sslmode"),
    ("sslpassword", "sslkey"),
    ("sslcrl", "sslrootcert"),
    ("sslcrldir", "sslrootcert"),
    ("search_path", "options"),
    ("currentschema", "options"),
];

/// Environment variables of libpq that may require a security feature which does not exist here.
const UNSUPPORTED_VARIABLES: [&str; 11] = [
    "PGCHANNELBINDING",
    "PGGSSENCMODE",
    "PGREQUIREAUTH",
    "PGREQUIREPEER",
    "PGREQUIRESSL",
    "PGSERVICE",
    "PGSSLCERTMODE",
    "PGSSLCRL",
    "PGSSLCRLDIR",
    "PGSSLNEGOTIATION",
    "PGSSLMINPROTOCOLVERSION",
];

/// Returns libpq's name of a parameter.
pub(super) fn name_of(name: &str) -> Result<&'static str, String> {
    if let Some((_, known)) = KNOWN.iter().find(|(spelling, _)| *spelling == name) {
        return Ok(known);
    }
    let near = name.to_ascii_lowercase();
    let foreign = FOREIGN.iter().find(|(other, _)| *other == near);
    let nearest = foreign.or_else(|| {
        let distance = |(spelling, _): &&(&str, &str)| distance(&near, spelling);
        let nearest = KNOWN.iter().min_by_key(distance);
        nearest.filter(|(spelling, _)| is_a_slip(&near, spelling))
    });
    Err(match nearest {
        Some((_, nearest)) => format!("no parameter {name:?}; the nearest is {nearest:?}"),
        None => {
            let names = KNOWN.iter().filter(|(spelling, name)| spelling == name);
            let names: Vec<_> = names.map(|(spelling, _)| *spelling).collect();
            format!("no parameter {name:?}; there are {}", names.join(", "))
        }
    })
}

/// Refuses unsupported variables, unless their value requires nothing.
pub(super) fn check_environment() -> Result<(), String> {
    for name in UNSUPPORTED_VARIABLES {
        if let Some(value) = env_value(name)?
            && !matches!(
                value.as_str(),
                "disable" | "allow" | "prefer" | "postgres" | "0" | "TLSv1" | "TLSv1.1" | "TLSv1.2"
            )
        {
            return Err(format!("no variable {name}, which is not supported"));
        }
    }
    Ok(())
}

fn is_a_slip(name: &str, spelling: &str) -> bool {
    distance(name, spelling) <= 1 + spelling.len() / 4
}

/// The Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
