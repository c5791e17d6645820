//! What the service manager is told (`NOTIFY_SOCKET`); nothing where there is none.

use sd_notify::NotifyState;
use tracing::warn;

/// Requests are answered.
pub(super) fn ready() {
    tell(&NotifyState::Ready);
}

/// The process is to stop.
pub(super) fn stopping() {
    tell(&NotifyState::Stopping);
}

/// The service goes on in another process.
pub(super) fn goes_on_in(pid: u32) {
    tell(&NotifyState::MainPid(pid));
}

fn tell(state: &NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(std::slice::from_ref(state)) {
        warn!(%error, "cannot tell the service manager `{state}`");
    }
}
