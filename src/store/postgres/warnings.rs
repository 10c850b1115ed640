//! Reports whether the server warned during a statement.
//!
//! A commit whose wait for the synchronous standby is cancelled (`pg_cancel_backend`, a cancel
//! request) reports success: the one sign is a WARNING between the answer and `ReadyForQuery`. sqlx
//! drops the server's notices and hands them to nobody; it only emits each as a `tracing` event.
//! Therefore a write runs under a subscriber of its own, which notes the event and passes it on, as
//! it passes everything else, to the subscriber of the process. What `RUST_LOG` hides is seen all
//! the same.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber, dispatcher,
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
    seen: Arc<AtomicBool>,
    dispatch: Dispatch,
}

impl Warnings {
    pub(super) fn new() -> Self {
        let seen = Arc::new(AtomicBool::new(false));
        let process = dispatcher::get_default(Clone::clone);
        let watch = Watch { seen: seen.clone(), max_level: LevelFilter::current(), process };
        Self { seen, dispatch: Dispatch::new(watch) }
    }

    /// Notes the warnings that the server sends while `statement` runs.
    pub(super) fn during<F: Future>(&self, statement: F) -> WithDispatch<F> {
        statement.with_subscriber(self.dispatch.clone())
    }

    /// Whether there was a warning since the last call.
    pub(super) fn take(&self) -> bool {
        self.seen.swap(false, Ordering::Relaxed)
    }
}

/// Notes warnings; all else is the subscriber's of the process.
struct Watch {
    seen: Arc<AtomicBool>,
    max_level: LevelFilter,
    process: Dispatch,
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
            self.seen.store(true, Ordering::Relaxed);
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
