//! The end of the process, step by step; each is logged.

use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic_health::ServingStatus;

use super::{Ended, Running, Signals};
use crate::{admin::Stage, api::HEALTH_NAMES, config::Settings, listener::Phase};

/// How long the store's last orders may take when the drain timeout has already gone by.
const LAST_FLUSH: Duration = Duration::from_secs(2);

impl Running {
    /// Waits for the signal, then drains; a signal to end at once ends that, too.
    pub(super) async fn until_drained(
        mut self,
        settings: &Settings,
        signals: &Signals,
    ) -> anyhow::Result<Ended> {
        tokio::select! {
            () = signals.drain.cancelled() => {}
            ended = &mut self.api.task => {
                bail!("the API listener ended by itself: {ended:?}");
            }
        }
        let in_flight = self.in_flight.clone();
        let mut flushed = false;
        tokio::select! {
            ended = self.drain(settings, &mut flushed) => ended,
            () = signals.now.cancelled() => {
                let requests = in_flight.count();
                tracing::warn!(requests, "told to end at once");
                Ok(if requests == 0 && flushed { Ended::Drained } else { Ended::CutOff })
            }
        }
    }

    async fn drain(self, settings: &Settings, flushed: &mut bool) -> anyhow::Result<Ended> {
        let Self { stage, health, in_flight, mut api, writers, mut admin } = self;

        stage.send_replace(Stage::Draining);
        for name in HEALTH_NAMES {
            health.set_service_status(name, ServingStatus::NotServing).await;
        }
        let delay = settings.drain_delay;
        tracing::info!(requests = in_flight.count(), ?delay, "draining: no longer ready");
        if !delay.is_zero() {
            api.phase.send_replace(Phase::Leaving { until: Instant::now() + delay });
            sleep(delay).await;
        }

        api.phase.send_replace(Phase::Stopping);
        let requests = in_flight.count();
        tracing::info!(requests, timeout = ?settings.drain_timeout, "draining: stopped accepting");
        let deadline = Instant::now() + settings.drain_timeout;
        let mut ended = Ended::Drained;
        if timeout_at(deadline, &mut api.task).await.is_err() {
            let requests = in_flight.count();
            if requests > 0 {
                ended = Ended::CutOff;
                tracing::warn!(requests, "draining: the time is up, requests are cut off");
            }
            api.kill.cancel();
            api.task.await?;
        }

        // The requests held the queue open; with the last of them gone the writers end.
        if timeout_at(deadline.max(Instant::now() + LAST_FLUSH), writers.finished()).await.is_err()
        {
            ended = Ended::CutOff;
            tracing::error!("draining: the store did not take its last orders in time");
        }
        *flushed = ended == Ended::Drained;
        stage.send_replace(Stage::Flushed);
        tracing::info!("draining: every order is stored");

        let wanted = settings.final_scrapes;
        if !settings.final_scrape_timeout.is_zero() {
            tracing::info!(timeout = ?settings.final_scrape_timeout, "draining: waiting for the final scrape");
            let scrapes = admin.final_scrapes.wait_for(|scrapes| *scrapes >= wanted);
            if timeout(settings.final_scrape_timeout, scrapes).await.is_err() {
                tracing::warn!("draining: no final scrape came; the last orders may go uncounted");
            }
        }
        admin.stop().await;
        tracing::info!("drained");
        Ok(ended)
    }
}
