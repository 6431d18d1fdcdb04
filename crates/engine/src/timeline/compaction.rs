//! Merging layers in the background: after each flush, on a thread that may block, one merge of a timeline at a time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use varve_storage::timeline::{FlushError, LayerChange, PublishError};

use super::ServedTimeline;

impl ServedTimeline {
    /// Merges layers as long as some are due, unless that goes on already. Never blocks.
    pub(super) fn spawn_compaction(self: &Arc<Self>) {
        if self.compacting.swap(true, Ordering::AcqRel) {
            return;
        }
        let timeline = self.clone();
        self.context.runtime.spawn_blocking(move || {
            if let Err(error) = timeline.compact() {
                tracing::warn!(timeline = timeline.name, %error, "layers could not be merged; the next flush tries again");
            }
            timeline.compacting.store(false, Ordering::Release);
        });
    }

    fn compact(&self) -> Result<(), FlushError> {
        let mut publish = |change: &LayerChange| self.publish(change);
        let give_up = || self.stopping.load(Ordering::Acquire);
        while !give_up() && self.history().compact(&mut publish, &give_up)? {}
        let runtime = &self.context.runtime;
        let mut check = || runtime.block_on(self.manifest.check_ownership()).map_err(|error| PublishError(error.to_string()));
        self.history().delete_retired(&mut check)?;
        Ok(())
    }
}
