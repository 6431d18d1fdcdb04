//! Tasks that live as long as what they serve.

use tokio::task::JoinHandle;

/// A task that ends with what it serves.
pub(crate) struct AbortOnDrop<T = ()>(pub(crate) JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
