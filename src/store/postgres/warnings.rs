//! Reports the server's warnings during a statement that may tell of a cancelled wait.
//!
//! A commit whose wait for the synchronous standby is cancelled (`pg_cancel_backend`, a cancel
//! request) reports success: the one sign is a WARNING between the answer and `ReadyForQuery`. sqlx
//! drops the server's notices and hands them to nobody; it only emits each as a `tracing` event.
//! Therefore a write runs under a subscriber of its own, which notes the event and passes it on, as
//! it passes everything else, to the subscriber of the process. What `RUST_LOG` hides is seen all
//! the same.
//!
//! The event has the warning's text and no SQLSTATE. In every language the text of a cancelled wait
//! is one line without a number. A text with a line break or a digit is another warning, such as
//! the plans and durations of `auto_explain`, and is not noted.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber, dispatcher,
    field::{Field, Visit},
    instrument::{WithDispatch, WithSubscriber as _},
    level_filters::LevelFilter,
    span::{Attributes, Id, Record},
    subscriber::Interest,
};

/// The target of sqlx's events for notices of the server.
const TARGET: &str = "sqlx::postgres::notice";

/// The warnings of one connection. Made once for each, because a new subscriber costs a look at
/// every call site of the program.
#[derive(Debug)]
pub(super) struct Warnings {
    noted: Noted,
    dispatch: Dispatch,
}

/// The texts, each once.
type Noted = Arc<Mutex<Vec<String>>>;

impl Warnings {
    pub(super) fn new() -> Self {
        let noted = Noted::default();
        let process = dispatcher::get_default(Clone::clone);
        let watch = Watch { noted: noted.clone(), max_level: LevelFilter::current(), process };
        Self { noted, dispatch: Dispatch::new(watch) }
    }

    /// Notes the warnings that the server sends while `statement` runs.
    pub(super) fn during<F: Future>(&self, statement: F) -> WithDispatch<F> {
        statement.with_subscriber(self.dispatch.clone())
    }

    /// The texts since the last call that may be those of a cancelled wait.
    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.noted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Notes warnings; all else is the subscriber's of the process.
struct Watch {
    noted: Noted,
    max_level: LevelFilter,
    process: Dispatch,
}

impl Watch {
    fn note(&self, text: String) {
        let is_another = text.contains(|c: char| c == '\n' || c.is_ascii_digit());
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_another && !noted.contains(&text) {
            noted.push(text);
        }
    }
}

/// The field `message` of an event; empty if there is none.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.0);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

fn is_warning(metadata: &Metadata<'_>) -> bool {
    metadata.target() == TARGET && *metadata.level() == Level::WARN
}

impl Subscriber for Watch {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if is_warning(metadata) {
            Interest::always()
        } else {
            self.process.register_callsite(metadata)
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.max_level.max(LevelFilter::WARN))
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        is_warning(metadata) || self.process.enabled(metadata)
    }

    fn event(&self, event: &Event<'_>) {
        if is_warning(event.metadata()) {
            let mut text = Text::default();
            event.record(&mut text);
            self.note(text.0);
            if !self.process.enabled(event.metadata()) {
                return;
            }
        }
        self.process.event(event);
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        self.process.new_span(span)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        self.process.record(span, values);
    }

    fn record_follows_from(&self, span: &Id, follows: &Id) {
        self.process.record_follows_from(span, follows);
    }

    fn enter(&self, span: &Id) {
        self.process.enter(span);
    }

    fn exit(&self, span: &Id) {
        self.process.exit(span);
    }

    fn clone_span(&self, id: &Id) -> Id {
        self.process.clone_span(id)
    }

    fn try_close(&self, id: Id) -> bool {
        self.process.try_close(id)
    }
}
