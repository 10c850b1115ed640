//! The command line of either program: what cannot be used is refused in one line, with exit code
//! 2. A stderr that is broken or that nobody reads causes neither a panic nor an unbounded wait.
//!
//! Depends on nothing of ours.

use std::{
    ffi::OsString,
    io::{Write as _, stderr, stdout},
    path::Path,
    process::ExitCode,
    sync::mpsc,
    thread,
    time::Duration,
};

use clap::{
    Parser,
    error::{ContextKind, ContextValue, ErrorKind},
};

/// Limit of writing one line: stderr may be a pipe that nobody reads.
const LINE_LIMIT: Duration = Duration::from_secs(1);

/// Why the arguments cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoArguments {
    /// The user asked for `--help` or `--version`: this is it.
    Asked(String),
    /// Exactly one line: the flag, its value and what is expected.
    BadUsage(String),
}

impl NoArguments {
    /// Of a flag that is of no use without others.
    pub fn without(given: &str, file: &Path, missing: &str) -> Self {
        Self::BadUsage(format!("{given} {file:?}: expected {missing} with it"))
    }

    /// Tells the user. The exit code: 0 for what was asked for, 1 if it could not be written, 2 for
    /// bad usage. The text on stdout waits for its reader, as the output of any command does.
    pub fn tell(&self, program: &str) -> ExitCode {
        match self {
            Self::Asked(text) => {
                let mut out = stdout();
                let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
                if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
            }
            Self::BadUsage(line) => {
                report(program, line);
                ExitCode::from(2)
            }
        }
    }
}

/// Writes one line to stderr, for a process that has no log. Gives up after a second; the write
/// then goes on until the process ends.
pub fn report(program: &str, line: &str) {
    let line = format!("{program}: {line}\n");
    let (done, written) = mpsc::channel();
    let writing = thread::Builder::new().spawn(move || {
        let _ = stderr().write_all(line.as_bytes());
        let _ = done.send(());
    });
    if writing.is_ok() {
        let _ = written.recv_timeout(LINE_LIMIT);
    }
}

/// Reads the arguments (the first is the program's name) and the environment that they name.
/// `shown` is what may be shown of a flag's refused value: never a password.
///
/// # Errors
/// See [`NoArguments`].
pub fn read<A: Parser>(
    args: impl IntoIterator<Item = OsString>,
    shown: impl Fn(&str, &str) -> String,
) -> Result<A, NoArguments> {
    A::try_parse_from(args).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => NoArguments::Asked(error.to_string()),
        ErrorKind::InvalidSubcommand => {
            let given = error.get(ContextKind::InvalidSubcommand).map(ToString::to_string);
            let command = A::command();
            let known: Vec<_> = command.get_subcommands().map(clap::Command::get_name).collect();
            let given = without_secrets(&given.unwrap_or_default());
            let known = known.join(", ");
            NoArguments::BadUsage(format!("{given:?}: expected {known} or a flag of --help"))
        }
        _ => NoArguments::BadUsage(one_line(&error, shown)),
    })
}

/// clap explains over several lines; scripts and log collectors want one.
fn one_line(error: &clap::Error, shown: impl Fn(&str, &str) -> String) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let arg = context(ContextKind::InvalidArg).unwrap_or("the command line");
    // An argument without a flag may be a URL that lacks its `--database-url`.
    let arg = &without_secrets(arg);
    let flag = arg.split_whitespace().next().unwrap_or(arg);
    let given = context(ContextKind::InvalidValue).unwrap_or_default();
    let value = &without_secrets(given);
    let line = match error.kind() {
        ErrorKind::UnknownArgument => format!("{arg:?}: expected a flag of --help"),
        ErrorKind::InvalidValue if value.is_empty() => {
            format!("{flag}: expected a value, see --help")
        }
        ErrorKind::InvalidValue => match error.get(ContextKind::ValidValue) {
            Some(ContextValue::Strings(valid)) => {
                format!("{flag} {value:?}: expected {}", valid.join(" or "))
            }
            _ => format!("{flag} {value:?}: expected another value, see --help"),
        },
        ErrorKind::ValueValidation => {
            let expected = std::error::Error::source(error).map(ToString::to_string);
            format!("{flag} {:?}: expected {}", shown(flag, given), expected.unwrap_or_default())
        }
        ErrorKind::ArgumentConflict => format!("{flag}: expected once"),
        ErrorKind::TooManyValues => format!("{flag} {value:?}: expected no value"),
        kind => format!("{flag}: {kind}"),
    };
    line.replace(['\n', '\r'], " ")
}

/// The text, or what is certainly no secret of it if it is a URL or has a user's name and password.
pub fn without_secrets(text: &str) -> String {
    match text.split_once("://") {
        Some((scheme, _)) => format!("{scheme}://***"),
        None if text.contains('@') => "***".to_owned(),
        None => text.to_owned(),
    }
}

/// For flags that name a PEM file.
///
/// # Errors
/// If there is no name, or it holds a control character.
pub fn pem_file(text: &str) -> Result<std::path::PathBuf, &'static str> {
    let text = single_line(text)?;
    if text.is_empty() { Err("the path of a PEM file") } else { Ok(text.into()) }
}

/// The value of a flag that is a URL or names a file, without the newline that a Secret made with
/// `echo` ends with.
///
/// # Errors
/// If it holds another control character.
pub fn single_line(text: &str) -> Result<&str, &'static str> {
    let text = text.trim_end_matches(['\r', '\n']);
    if text.contains(char::is_control) { Err("no control character within it") } else { Ok(text) }
}
