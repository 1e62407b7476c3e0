//! The host's firewall table is not the agent's alone to change: whoever loads rules of his own may remove it, as
//! `systemctl restart nftables` does. It is looked at again and again, and put in place again.

use crate::agent::Agent;
use crate::context::{Report, TimerKey};
use crate::net::{NetError, host};

/// How long the table may be gone, in milliseconds. Looking takes one run of `nft`, some milliseconds.
pub const MEND_MS: u64 = 10_000;

impl Agent {
    /// Looks at the table, unless the agent is ending; [`Report::Mended`] follows.
    pub(crate) fn begin_mending(&mut self) {
        if self.is_stopping() {
            return;
        }
        let networks: Vec<_> =
            self.capsules.values().filter_map(|capsule| capsule.network_handle()).collect();
        self.ctx.workers.submit_apart(move || Report::Mended(host::mend(&networks)));
    }

    /// It was looked at.
    pub(crate) fn on_mended(&mut self, result: Result<bool, NetError>) {
        match result {
            Ok(false) => {}
            Ok(true) => log::warn!(
                "the firewall table of capsules was gone, and is in place again; load rules of your own without \
                 `flush ruleset`"
            ),
            Err(e) => log::error!("looking after the firewall table of capsules: {e}"),
        }
        self.ctx.timers.set(TimerKey::Mend, self.ctx.now_ms() + MEND_MS);
    }
}
