//! Wakes the sender at a moment, to within some 100 µs; tokio's own timers round up to the next
//! millisecond, which every latency would then hold.

use std::{
    io,
    sync::{Arc, mpsc},
    thread,
};

use tokio::{sync::Notify, time::Instant};

/// A thread that sleeps.
#[derive(Debug)]
pub struct Pacer {
    alarms: mpsc::Sender<Instant>,
    woken: Arc<Notify>,
}

impl Pacer {
    /// Starts the thread; it ends with this.
    ///
    /// # Errors
    /// If there can be no further thread.
    pub fn start() -> io::Result<Self> {
        let (alarms, set) = mpsc::channel::<Instant>();
        let woken = Arc::new(Notify::new());
        let wakes = woken.clone();
        thread::Builder::new().name("pacer".to_owned()).spawn(move || {
            for alarm in set {
                thread::sleep(alarm.saturating_duration_since(Instant::now()));
                wakes.notify_one();
            }
        })?;
        Ok(Self { alarms, woken })
    }

    /// Returns at the moment, at once if it has passed.
    pub async fn wait_until(&self, moment: Instant) {
        if moment > Instant::now() {
            self.alarms.send(moment).expect("the thread takes alarms while this exists");
        }
        // A call that was given up before its alarm leaves that to the next.
        while moment > Instant::now() {
            self.woken.notified().await;
        }
    }
}
