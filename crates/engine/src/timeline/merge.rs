//! Merging and collecting layers in the background: after each flush, and when history is not retained any more; one
//! merge of a timeline at a time.

use std::sync::Arc;

use varve_storage::timeline::{LayerChange, PublishError};

use super::LiveTimeline;
use crate::work_queue::Next;

impl LiveTimeline {
    /// One step: one merge if one is due; else the objects of merged layers are deleted.
    pub(super) fn merge_step(self: &Arc<Self>) -> Next {
        let mut publish = |change: &LayerChange| self.publish(change);
        let give_up = || self.is_closing();
        let mut check = || self.context.threads.wait(self.manifest.check_ownership()).map_err(PublishError::from);
        let retained = self.retained(&self.log.state());
        let done = match self.history.compact(&retained, &mut publish, &give_up) {
            Ok(true) => return Next::More,
            Ok(false) => self.history.delete_retired(&mut check),
            Err(error) => Err(error),
        };
        if let Err(error) = done
            && !self.is_lost(&error)
        {
            tracing::warn!(timeline = self.name, %error, "layers could not be merged; the next flush tries again");
        }
        Next::Done
    }
}
