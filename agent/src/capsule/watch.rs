//! What is asked about a capsule that runs: to change what it may reach, and what it uses.

use super::admission::Promised;
use super::lifecycle::Goal;
use super::limits::host_memory_mb;
use super::{Capsule, MIB, Waiter};
use crate::context::{Context, Report};
use crate::metrics::keeping::FILE_NAME as USAGE_NAME;
use crate::metrics::{Probe, Usage};
use crate::net::{CapsuleNetwork, Policy, PolicyHandle};
use std::path::PathBuf;
use wire::message::CapsuleState;

impl Capsule {
    /// Begins to change what its guest may reach; [`Report::NetworkChanged`] follows.
    ///
    /// # Errors
    /// Why that cannot be done now, for a person.
    pub fn change_network(&self, ctx: &Context, policy: Policy, waiter: Waiter) -> Result<(), String> {
        let (state, network) = (self.state(), self.network.as_ref());
        let Some(network) = network.filter(|_| state == CapsuleState::Running) else {
            return Err(format!("the capsule is {}; this needs one that is running", state.name()));
        };
        let (handle, directory, id) = (network.policy_handle(), self.directory.clone(), self.spec.id.clone());
        ctx.workers.submit(move || {
            let result = handle.change(&policy, &directory);
            Report::NetworkChanged { waiter, capsule_id: id, result }
        });
        Ok(())
    }

    /// Its network's policy, where it has a network.
    pub fn network_handle(&self) -> Option<PolicyHandle> {
        self.network.as_ref().map(CapsuleNetwork::policy_handle)
    }

    /// Adds what it was promised and does not have yet. Its VMM takes `overhead_mb`.
    pub fn add_promised(&self, sum: Promised, overhead_mb: u32) -> Promised {
        let disk_bytes = u64::from(self.disk_mb) * MIB;
        let growth = disk_bytes.saturating_sub(self.disk_bytes.unwrap_or(0)) / MIB;
        let disk_mb = sum.disk_mb + growth;
        if !self.holds_resources() {
            return Promised { disk_mb, ..sum };
        }
        let is_private = self.record.base.is_some() || self.shared_memory.is_some();
        let touched = self.probe.as_ref().map_or(0, |probe| probe.touched_bytes(is_private));
        let untouched = host_memory_mb(self.spec.memory_mb, overhead_mb).saturating_sub(touched / MIB);
        Promised {
            vcpus: sum.vcpus + u64::from(self.spec.vcpus),
            memory_mb: sum.memory_mb + untouched,
            disk_mb: disk_mb + u64::from(self.spec.memory_mb),
        }
    }

    /// What it used and where that is to be kept; `None` for one that goes, with all that is in its directory.
    pub fn usage_to_keep(&mut self) -> Option<(PathBuf, Usage)> {
        let stays = self.lifecycle.goal() != Goal::Down && self.record.ready;
        stays.then(|| (self.directory.join(USAGE_NAME), self.usage.take_changed()))
    }

    /// Notes what it uses now, if its VMM runs. Its disk is asked only with `with_disk`.
    pub fn sample_usage(&mut self, unix_ms: u64, with_disk: bool) {
        let Some(machine) = &self.machine else {
            self.probe = None;
            return;
        };
        let pid = machine.pid();
        if self.probe.as_ref().is_none_or(|probe| probe.pid() != pid) {
            self.probe = Probe::new(pid, self.spec.vcpus).ok();
            self.disk_bytes = None;
        }
        if with_disk || self.disk_bytes.is_none() {
            self.disk_bytes = self.disk.as_ref().and_then(|disk| disk.allocated_bytes().ok());
        }
        let Some(probe) = &mut self.probe else { return };
        match probe.sample(self.disk_bytes.unwrap_or(0)) {
            Ok(sample) => self.usage.push(unix_ms, sample),
            // It has ended, and its end is yet to be noticed.
            Err(_) => self.probe = None,
        }
    }
}
