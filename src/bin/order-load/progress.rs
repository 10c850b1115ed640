//! How it goes, on stderr: a bar for each phase, or plain lines where stderr is no terminal. Failed
//! writes are ignored: `eprintln!` would panic.

use std::{
    io::{IsTerminal as _, Write as _, stderr},
    sync::Arc,
    time::Duration,
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval_at},
};

use crate::{report::seconds, schedule::Phases, sender::Sender};

/// Between two pictures of the bars, and between two lines.
const PICTURE: Duration = Duration::from_millis(200);
const LINE: Duration = Duration::from_secs(5);

/// Shows it until it is ended.
#[derive(Debug)]
pub struct Progress {
    end: oneshot::Sender<()>,
    showing: JoinHandle<()>,
}

impl Progress {
    /// Begins with the first phase.
    pub fn start(phases: &Phases, sender: Arc<Sender>, start: Instant) -> Self {
        let (end, ended) = oneshot::channel();
        let mut begin = start;
        let mut lanes = Vec::new();
        for phase in &phases.0 {
            let until = begin + phase.duration;
            lanes.push(Lane { name: phase.name.clone(), begin, until, bar: None, over: false });
            begin = until;
        }
        let showing = tokio::spawn(show(lanes, sender, ended));
        Self { end, showing }
    }

    /// Shows the last figures.
    pub async fn end(self) {
        // If the task is gone there is nothing to show any more.
        let _ = self.end.send(());
        let _ = self.showing.await;
    }
}

/// One phase.
struct Lane {
    name: String,
    begin: Instant,
    until: Instant,
    bar: Option<ProgressBar>,
    over: bool,
}

async fn show(mut lanes: Vec<Lane>, sender: Arc<Sender>, mut ended: oneshot::Receiver<()>) {
    let bars = stderr().is_terminal().then(MultiProgress::new);
    let period = if bars.is_some() { PICTURE } else { LINE };
    let mut ticks = interval_at(Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let last = tokio::select! {
            _ = ticks.tick() => false,
            _ = &mut ended => true,
        };
        let now = Instant::now();
        for (phase, lane) in lanes.iter_mut().enumerate() {
            if !lane.over && lane.begin < now {
                lane.over = last || lane.until <= now && bars.is_none();
                lane.show(&figures(&sender, phase, lane, now), bars.as_ref(), now);
            }
        }
        if last {
            if bars.is_some() {
                // The last bar leaves the cursor behind it.
                let _ = writeln!(stderr());
            }
            return;
        }
    }
}

/// Rate, ok, failed, p99 so far.
fn figures(sender: &Sender, phase: usize, lane: &Lane, now: Instant) -> String {
    let record = sender.recorder.phase(phase).clone();
    let passed = now.min(lane.until).duration_since(lane.begin).as_secs_f64();
    #[allow(clippy::cast_precision_loss, reason = "for the eye")]
    let rate = record.sent as f64 / passed.max(1e-3);
    let (ok, failed) = (record.ok, record.failures());
    let unsent =
        if record.unsent > 0 { format!(", unsent {}", record.unsent) } else { String::new() };
    let p99 = if ok > 0 { seconds(record.latency(0.99)) } else { "-".to_owned() };
    format!("{rate:.1}/s, ok {ok}, failed {failed}{unsent}, p99 {p99}")
}

impl Lane {
    fn show(&mut self, figures: &str, bars: Option<&MultiProgress>, now: Instant) {
        let length = self.until - self.begin;
        let passed = now.min(self.until) - self.begin;
        let Some(bars) = bars else {
            let _ = writeln!(
                stderr(),
                "{}: {:.0} of {} s: {figures}",
                self.name,
                passed.as_secs_f64(),
                length.as_secs_f64()
            );
            return;
        };
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{prefix:>12} {wide_bar} {msg}");
            let bar = ProgressBar::new(millis(length)).with_prefix(self.name.clone());
            bars.add(bar.with_style(style.expect("the template is right")))
        });
        bar.set_position(millis(passed));
        bar.set_message(figures.to_owned());
        if self.over {
            bar.abandon();
        }
    }
}
