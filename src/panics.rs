//! Panics of requests: told once, in the log's form and with the request they belong to, where the
//! standard hook would print them to stderr as they please, and wait for it.
//!
//! Depends on nothing of ours.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    panic::{PanicHookInfo, set_hook},
};

thread_local! {
    // The hook is the only one to learn where a panic was, and it runs on the panicking thread.
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// From now on, panics that [`contained`] will report are noted, all others are logged. For `main`
/// alone: the hook is the process's. It must never panic, which would abort the process; the log
/// does not, whatever stderr is.
pub fn log_panics() {
    set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        if CONTAINED.get() {
            // Fails while the thread ends; the panic is then logged without its place.
            let _ = PLACE.try_with(|noted| noted.replace(Some(place)));
        } else {
            tracing::error!(place, cause = message(info.payload()), "a task panicked");
        }
    }));
}

/// Runs a piece that catches its panics, and makes a text of a caught one: its message and, if
/// [`log_panics`] was called, its place.
pub fn contained<T>(piece: impl FnOnce() -> Result<T, Box<dyn Any + Send>>) -> Result<T, String> {
    let outer = CONTAINED.replace(true);
    let result = piece();
    CONTAINED.set(outer);
    result.map_err(|panic| {
        let message = message(panic.as_ref());
        match PLACE.try_with(RefCell::take).ok().flatten() {
            Some(place) => format!("panicked at {place}: {message}"),
            None => format!("panicked: {message}"),
        }
    })
}

fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
