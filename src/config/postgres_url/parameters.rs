//! The names of a URL's parameters: those that are understood, and the nearest for any other.

use super::variable_of;

/// Every spelling that is understood, and libpq's name of it.
const UNDERSTOOD: [(&str, &str); 19] = [
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

/// Of libpq and of other drivers: what serves the same end here, where the spelling does not tell.
const ELSEWHERE: [(&str, &str); 12] = [
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

/// Variables of libpq that may ask for more safety than there is. Values that ask for none are
/// accepted.
const IN_VAIN: [&str; 12] = [
    "PGCHANNELBINDING",
    "PGGSSENCMODE",
    "PGREQUIREAUTH",
    "PGREQUIREPEER",
    "PGREQUIRESSL",
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGSSLCERTMODE",
    "PGSSLCRL",
    "PGSSLCRLDIR",
    "PGSSLNEGOTIATION",
    "PGSSLMINPROTOCOLVERSION",
];

/// libpq's name of a parameter.
pub(super) fn name_of(name: &str) -> Result<&'static str, String> {
    if let Some((_, known)) = UNDERSTOOD.iter().find(|(spelling, _)| *spelling == name) {
        return Ok(known);
    }
    let near = name.to_ascii_lowercase();
    let elsewhere = ELSEWHERE.iter().find(|(other, _)| *other == near);
    let nearest = elsewhere.or_else(|| {
        let distance = |(spelling, _): &&(&str, &str)| distance(&near, spelling);
        let nearest = UNDERSTOOD.iter().min_by_key(distance);
        nearest.filter(|(spelling, _)| is_a_slip(&near, spelling))
    });
    Err(match nearest {
        Some((_, nearest)) => format!("no parameter {name:?}; the nearest is {nearest:?}"),
        None => {
            let known = UNDERSTOOD.iter().filter(|(spelling, known)| spelling == known);
            let known: Vec<_> = known.map(|(spelling, _)| *spelling).collect();
            format!("no parameter {name:?}; there are {}", known.join(", "))
        }
    })
}

/// Refuses what the environment asks for in vain.
pub(super) fn check_environment() -> Result<(), String> {
    for name in IN_VAIN {
        if let Some(value) = variable_of(name)?
            && !matches!(
                value.as_str(),
                "disable" | "allow" | "prefer" | "postgres" | "0" | "TLSv1" | "TLSv1.1" | "TLSv1.2"
            )
        {
            return Err(format!("no {name} in the environment: what it asks for is not supported"));
        }
    }
    Ok(())
}

fn is_a_slip(name: &str, spelling: &str) -> bool {
    distance(name, spelling) <= 1 + spelling.len() / 4
}

/// Levenshtein's: how many letters have to be changed, added or left out.
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
