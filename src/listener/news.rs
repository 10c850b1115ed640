//! What connections learn of the shutdown. Depends on [`Phase`] alone.

use futures_util::{Stream, stream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Phase;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    /// The shutdown went on to it.
    Phase(Phase),
    /// All that is left is to be cut off. Nothing else comes after it.
    Kill,
}

/// What comes after the phase that `phase` has seen. A connection is polled some times for each of its
/// calls, and to poll what waits for the common news takes locks that all connections share: this does
/// so at first and whenever the news wake it, and else looks at what is the connection's alone.
pub(super) fn news(
    phase: watch::Receiver<Phase>,
    kill: CancellationToken,
) -> impl Stream<Item = News> + Send + Unpin {
    let news = stream::unfold(Some(phase), move |phase| {
        let kill = kill.clone();
        async move { Some(next(phase, kill).await) }
    });
    // It is made of what polls each of its streams only once that one was woken.
    stream::select_all([Box::pin(news)])
}

async fn next(
    phase: Option<watch::Receiver<Phase>>,
    kill: CancellationToken,
) -> (News, Option<watch::Receiver<Phase>>) {
    let Some(mut phase) = phase else {
        kill.cancelled().await;
        return (News::Kill, None);
    };
    tokio::select! {
        biased;
        () = kill.cancelled() => (News::Kill, None),
        changed = phase.changed() => {
            // A sender that is gone has nobody left to tell when to stop: that is now.
            let to = changed.map_or(Phase::Stopping, |()| *phase.borrow_and_update());
            (News::Phase(to), Some(phase).filter(|_| to != Phase::Stopping))
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, StreamExt as _};
    use tokio::time::Instant;

    use super::*;
    use crate::listener::Shutdown;

    #[tokio::test]
    async fn each_phase_comes_once_and_the_kill_last() {
        let (sender, Shutdown { phase, kill, .. }) = Shutdown::new();
        let mut news = news(phase, kill.clone());
        assert_eq!(news.next().now_or_never(), None);
        let leaving = Phase::Leaving { until: Instant::now() };
        for phase in [leaving, Phase::Stopping] {
            sender.send(phase).unwrap();
            assert_eq!(news.next().now_or_never(), Some(Some(News::Phase(phase))));
            assert_eq!(news.next().now_or_never(), None);
        }
        drop(sender);
        assert_eq!(news.next().now_or_never(), None);
        kill.cancel();
        assert_eq!(news.next().now_or_never(), Some(Some(News::Kill)));
    }

    #[tokio::test]
    async fn a_kill_comes_before_a_phase_and_wakes_who_waits() {
        let (sender, Shutdown { phase, kill, .. }) = Shutdown::new();
        let mut first = news(phase.clone(), kill.clone());
        let mut second = news(phase, kill.clone());
        let waiting = tokio::spawn(async move { first.next().await });
        tokio::task::yield_now().await;
        sender.send(Phase::Stopping).unwrap();
        assert_eq!(waiting.await.unwrap(), Some(News::Phase(Phase::Stopping)));
        kill.cancel();
        assert_eq!(second.next().now_or_never(), Some(Some(News::Kill)));
    }

    #[tokio::test]
    async fn every_news_wakes_the_task_that_waits() {
        let (sender, Shutdown { phase, kill, .. }) = Shutdown::new();
        let mut news = news(phase, kill.clone());
        let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            for _ in 0..3 {
                told.send(news.next().await.unwrap()).unwrap();
            }
        });
        for phase in [Phase::Leaving { until: Instant::now() }, Phase::Stopping] {
            tokio::task::yield_now().await;
            sender.send(phase).unwrap();
            assert_eq!(heard.recv().await, Some(News::Phase(phase)));
        }
        tokio::task::yield_now().await;
        kill.cancel();
        assert_eq!(heard.recv().await, Some(News::Kill));
    }

    #[tokio::test]
    async fn a_sender_that_is_gone_stops_all_once() {
        let (sender, Shutdown { phase, kill, .. }) = Shutdown::new();
        let mut news = news(phase, kill);
        drop(sender);
        assert_eq!(news.next().await, Some(News::Phase(Phase::Stopping)));
        assert_eq!(news.next().now_or_never(), None);
    }
}
