//! The tenant's password, given to the superuser at a start and when it is rotated.

use std::time::Duration;

use varve_api::host::Password;

use crate::sessions::{SessionError, Sessions};
use crate::task::AbortOnDrop;

/// How long a start waits for the tenant's password to be set. Whoever connects should find it set; whoever commits
/// already waits for us to attach.
const PASSWORD_WAIT: Duration = Duration::from_secs(2);
/// How long setting it may take behind locks of the tenant's, once the compute is attached.
const PASSWORD_MAX: Duration = Duration::from_secs(600);
/// How often that is tried. Each try that is given up may hold a walsender's place for as long as the lock is there.
const PASSWORD_TRIES: u32 = 3;
/// Pause between two tries.
const PAUSE: Duration = Duration::from_secs(10);

/// Gives the superuser the tenant's password: now, or where locks or faults of the tenant's are in the way, later, by
/// the task that this gives.
///
/// # Errors
/// When our role may not do that.
pub(crate) async fn set(sessions: &Sessions, password: &Password) -> Result<Option<AbortOnDrop>, SessionError> {
    let error = match sessions.set_password(password, PASSWORD_WAIT).await {
        Ok(()) => return Ok(None),
        Err(error) if error.is_locked_out() => return Err(error),
        Err(error) => error,
    };
    tracing::warn!(%error, "the tenant's password could not be set yet");
    let (sessions, password) = (sessions.clone(), password.clone());
    Ok(Some(AbortOnDrop(tokio::spawn(async move {
        for _ in 0..PASSWORD_TRIES {
            match sessions.set_password(&password, PASSWORD_MAX).await {
                Ok(()) => return tracing::info!("the tenant's password is set"),
                Err(error) => tracing::warn!(%error, "the tenant's password could not be set"),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }))))
}
