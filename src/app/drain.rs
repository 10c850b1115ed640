//! The end of the process, step by step; each is logged once it is done.

use std::time::Duration;

use anyhow::{anyhow, bail};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{Ended, Running, Signals};
use crate::{admin::Stage, config::Settings, listener::Phase};

/// How long the store's last orders may take when the drain timeout has already gone by.
const LAST_FLUSH: Duration = Duration::from_secs(2);

/// The same when all is to end at once: enough to see that there are none.
const AT_ONCE: Duration = Duration::from_millis(250);

impl Running {
    /// Waits for the signal, then drains; a signal to end at once ends that, too. A part that fails
    /// drains the others before its error is returned.
    pub(super) async fn until_drained(
        mut self,
        settings: &Settings,
        signals: &Signals,
    ) -> anyhow::Result<Ended> {
        let mut failure = tokio::select! {
            () = signals.drain.cancelled() => None,
            ended = &mut self.api.task => bail!("the API listener ended by itself: {ended:?}"),
            ended = &mut self.admin.task => bail!("the admin listener ended by itself: {ended:?}"),
            error = self.writers.as_mut().expect("they are taken in the drain").failed() => {
                tracing::error!(error = error.to_string(), "told to end by a failure");
                Some(anyhow!(error))
            }
        };
        let ended = tokio::select! {
            ended = self.drain(settings, &mut failure) => ended?,
            () = signals.now.cancelled() => self.end_at_once().await,
        };
        failure.map_or(Ok(ended), Err)
    }

    async fn drain(
        &mut self,
        settings: &Settings,
        failure: &mut Option<anyhow::Error>,
    ) -> anyhow::Result<Ended> {
        let delay = settings.drain_delay;
        self.stage.send_replace(Stage::Draining);
        self.health.set_not_serving();
        if !delay.is_zero() {
            self.api.phase.send_replace(Phase::Leaving { until: Instant::now() + delay });
        }
        tracing::info!(requests = self.in_flight.count(), ?delay, "draining: no longer ready");
        sleep(delay).await;

        self.api.phase.send_replace(Phase::Stopping);
        self.api.closed.cancelled().await;
        let deadline = Instant::now() + settings.drain_timeout;
        let requests = self.in_flight.count();
        tracing::info!(requests, timeout = ?settings.drain_timeout, "draining: stopped accepting");

        let mut ended = Ended::Drained;
        if let Ok(listened) = timeout_at(deadline, &mut self.api.task).await {
            listened?;
            tracing::info!("draining: every request is answered");
        } else {
            let requests = self.in_flight.count();
            if requests > 0 {
                ended = Ended::CutOff;
            }
            tracing::warn!(requests, "draining: the time is up, requests are cut off");
            self.api.kill.cancel();
            (&mut self.api.task).await?;
        }

        // The requests held the queue open; with the last of them gone the writers end.
        let writers = self.writers.take().expect("they are taken here only");
        let flush_by = deadline.max(Instant::now() + LAST_FLUSH);
        match timeout_at(flush_by, writers.finished()).await {
            Ok(Ok(())) => tracing::info!("draining: every order is stored"),
            Ok(Err(error)) => *failure = Some(anyhow!(error)),
            Err(_) => {
                ended = Ended::CutOff;
                tracing::error!("draining: the store did not take its last orders in time");
            }
        }
        self.stage.send_replace(Stage::Flushed);

        if !settings.final_scrape_timeout.is_zero() {
            self.wait_for_final_scrapes(settings).await;
        }
        self.admin.stop().await;
        tracing::info!("drained");
        Ok(ended)
    }

    async fn wait_for_final_scrapes(&mut self, settings: &Settings) {
        let (wanted, limit) = (settings.final_scrapes, settings.final_scrape_timeout);
        tracing::info!(wanted, timeout = ?limit, "draining: waiting for the final scrape");
        let scrapes = self.admin.final_scrapes.wait_for(|scrapes| *scrapes >= wanted);
        match timeout(limit, scrapes).await {
            Ok(_) => tracing::info!("draining: the final scrape was answered"),
            Err(_) => {
                tracing::warn!("draining: no final scrape came; the last orders may go uncounted");
            }
        }
    }

    /// Cuts off what is left, wherever the drain is.
    async fn end_at_once(&mut self) -> Ended {
        let requests = self.in_flight.count();
        tracing::warn!(requests, "told to end at once");
        self.api.phase.send_replace(Phase::Stopping);
        self.api.kill.cancel();
        if !self.api.task.is_finished() {
            let _ = timeout(AT_ONCE, &mut self.api.task).await;
        }
        let flushed = match self.writers.take() {
            Some(writers) => matches!(timeout(AT_ONCE, writers.finished()).await, Ok(Ok(()))),
            // The drain has taken them: it flushed them, or was just about to.
            None => *self.stage.borrow() == Stage::Flushed,
        };
        if requests == 0 && flushed { Ended::Drained } else { Ended::CutOff }
    }
}

#[cfg(test)]
mod tests;
