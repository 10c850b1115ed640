//! Logs every failed request once, with its id and the caller's trace. Strangers can fail requests
//! at will, so the lines that they cause are short and limited to 10 a second; one more line a
//! second reports how many were omitted.
//!
//! Depends on the error table, not on the other layers.

use std::{fmt::Display, sync::Arc};

use http::Response;
use tokio::{sync::Notify, time::sleep};
use tonic::{Code, Status};

use self::{fields::shortened, limit::PERIOD};
use crate::{
    error::Error,
    metrics::{Protocol, RequestMetrics},
};

mod fields;
mod limit;

pub(super) use self::{
    fields::{Path, Text, Traceparent, method, path, traceparent},
    limit::Limit,
};

/// The fields of a line that name its request.
#[derive(Debug)]
pub(super) struct Subject<'r> {
    pub(super) request_id: &'r str,
    /// Empty if the caller sent none.
    pub(super) traceparent: &'r str,
    pub(super) protocol: Protocol,
    pub(super) method: &'r str,
    pub(super) path: &'r str,
    /// Whether the caller's `grpc-timeout` is shorter than the server's deadline.
    pub(super) short_timeout: bool,
}

/// Logs failed requests; clones share the limits.
#[derive(Debug, Clone)]
pub struct FailureLog(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    metrics: Arc<RequestMetrics>,
    /// Full names of the gRPC services whose calls are in no metric.
    unrecorded: &'static [&'static str],
    /// For failures that are the caller's fault.
    callers: Limit,
    /// For the server's deadline. A caller who sends slowly can make it pass, but so can a slow
    /// server: a flood of other failures must not hide these lines.
    deadlines: Limit,
    /// Notified when a line is omitted.
    omitted: Notify,
}

/// How a failure is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Severity {
    /// A bug or a failure of the server. Never limited.
    Error,
    /// The server's deadline passed.
    Deadline,
    /// The caller's fault.
    Caller,
    /// One of thousands in an outage or an overload, whose begin and end are logged where they are
    /// noticed; the metrics have the number.
    Debug,
}

impl FailureLog {
    /// Also counts shed and malformed requests in the metrics. Malformed calls of `unrecorded`
    /// services, by their full names, are not counted: the error ratio subtracts malformed calls
    /// from calls that are recorded.
    pub fn new(metrics: Arc<RequestMetrics>, unrecorded: &'static [&'static str]) -> Self {
        let (callers, deadlines, omitted) = Default::default();
        Self(Arc::new(Shared { metrics, unrecorded, callers, deadlines, omitted }))
    }

    fn count_malformed(&self, subject: &Subject<'_>) {
        let service = subject.path.strip_prefix('/').and_then(|path| path.split_once('/'));
        if service.is_none_or(|(service, _)| !self.0.unrecorded.contains(&service)) {
            self.0.metrics.malformed(subject.protocol).inc();
        }
    }

    /// Reports how many lines were omitted, at most once a second. Never returns.
    pub async fn report_omitted(self) {
        loop {
            self.0.omitted.notified().await;
            sleep(PERIOD).await;
            self.report_now();
        }
    }

    /// Reports how many lines were omitted since the last report, unless none were.
    pub fn report_now(&self) {
        let (callers, deadlines) = (self.0.callers.take(), self.0.deadlines.take());
        if callers > 0 {
            tracing::info!(requests = callers, "further requests failed");
        }
        if deadlines > 0 {
            tracing::warn!(requests = deadlines, "further requests missed the deadline");
        }
    }

    /// Logs the request if it failed, and counts it if it was shed or malformed.
    pub(super) fn record<'r, R>(
        &self,
        response: &Response<R>,
        subject: impl FnOnce() -> Subject<'r>,
    ) {
        let extensions = response.extensions();
        if let Some(error) = extensions.get::<Arc<Error>>() {
            return self.record_error(&subject(), &response.status().as_u16(), error);
        }
        let failed = extensions.get::<Status>().filter(|status| status.code() != Code::Ok);
        let Some(status) = failed else { return };
        let source = std::error::Error::source(status);
        let code = format_args!("{:?}", status.code());
        match source.and_then(<dyn std::error::Error>::downcast_ref) {
            Some(error) => self.record_error(&subject(), &code, error),
            // tonic's own: the bytes are no message, or a message of an encoding that it does not
            // know.
            None => {
                let subject = subject();
                if matches!(status.code(), Code::Internal | Code::Unimplemented) {
                    self.count_malformed(&subject);
                }
                self.log(Severity::Caller, &subject, &code, &status.message());
            }
        }
    }

    fn record_error(&self, subject: &Subject<'_>, code: &dyn Display, error: &Error) {
        let severity = match error {
            Error::Internal(_) => Severity::Error,
            Error::DeadlineExceeded if subject.short_timeout => Severity::Caller,
            Error::DeadlineExceeded => Severity::Deadline,
            Error::Shed(reason) => {
                self.0.metrics.shed(subject.protocol, *reason).inc();
                Severity::Debug
            }
            Error::Malformed(_)
            | Error::UnknownCodec(_)
            | Error::NotACall(_)
            | Error::Incomplete => {
                self.count_malformed(subject);
                Severity::Caller
            }
            Error::StoreUnavailable | Error::CallerGone => Severity::Debug,
            _ => Severity::Caller,
        };
        match error.cause() {
            Some(cause) => self.log(severity, subject, code, &cause),
            None => self.log(severity, subject, code, error),
        }
    }

    /// Texts must be recorded as strings, which the text format quotes: with `%cause` a stranger
    /// could forge fields and lines.
    fn log(
        &self,
        severity: Severity,
        subject: &Subject<'_>,
        code: &dyn Display,
        cause: &dyn Display,
    ) {
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    request_id = subject.request_id,
                    traceparent = subject.traceparent,
                    protocol = subject.protocol.as_str(),
                    method = subject.method,
                    path = subject.path,
                    %code,
                    cause = shortened(cause),
                    "request failed"
                )
            };
        }
        match severity {
            Severity::Error => line!(error),
            Severity::Deadline if self.admits(&self.0.deadlines) => line!(warn),
            Severity::Caller if self.admits(&self.0.callers) => line!(info),
            Severity::Deadline | Severity::Caller => {}
            Severity::Debug => line!(debug),
        }
    }

    /// Logs a response that its peer did not read in time.
    pub(super) fn cut_off(&self, subject: &Subject<'_>) {
        if self.admits(&self.0.callers) {
            tracing::info!(
                request_id = subject.request_id,
                traceparent = subject.traceparent,
                "a response was cut off: its peer did not read it in time"
            );
        }
    }

    /// Logs a response that failed after its head was sent.
    pub(super) fn broke_off(&self, subject: &Subject<'_>, cause: &str) {
        tracing::error!(
            request_id = subject.request_id,
            traceparent = subject.traceparent,
            cause = shortened(&cause),
            "a response broke off"
        );
    }

    fn admits(&self, limit: &Limit) -> bool {
        let admitted = limit.admits();
        if !admitted {
            self.0.omitted.notify_one();
        }
        admitted
    }
}
