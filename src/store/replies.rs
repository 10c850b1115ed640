//! The replies of a batch, by the runtime that their callers wait on. Each runtime is woken once, and
//! wakes its callers by itself: to wake a task on another thread takes a system call, and a thread that
//! is woken by the first of many callers writes each answer by itself.

use tokio::{runtime::Handle, sync::oneshot};

use super::StoreError;
use crate::order::Placed;

/// What an order's caller is told.
pub(super) type Reply = Result<Placed, StoreError>;

/// A caller, and what it is to be told.
type Due = (oneshot::Sender<Reply>, Reply);

/// See the [module](self).
#[derive(Default)]
pub(super) struct Replies(Vec<(Handle, Vec<Due>)>);

impl Replies {
    pub(super) fn add(&mut self, home: Handle, caller: oneshot::Sender<Reply>, reply: Reply) {
        // There are no more than there are threads, so that to look at each is fastest.
        match self.0.iter_mut().find(|(at, _)| at.id() == home.id()) {
            Some((_, replies)) => replies.push((caller, reply)),
            None => self.0.push((home, vec![(caller, reply)])),
        }
    }

    pub(super) fn send(self) {
        for (home, replies) in self.0 {
            home.spawn(async move {
                for (caller, reply) in replies {
                    // A caller that is gone was told that the outcome is unknown.
                    let _ = caller.send(reply);
                }
            });
        }
    }
}
