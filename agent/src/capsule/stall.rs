//! A guest that stands still because the host's storage is full: its VMM has stopped it at the write that
//! did not fit, so that it loses nothing, and nobody but the agent lets it go on.

use super::Capsule;
use crate::disk;
use crate::vmm;
use wire::message::CapsuleState;

impl Capsule {
    /// Takes note of what its VMM says of whether the guest runs. While it is saved, it stands still because
    /// it was told to.
    pub(super) fn note_standing(&mut self, event: &vmm::Event) {
        let was = self.stalled;
        match event {
            vmm::Event::Paused => self.stalled = self.state() == CapsuleState::Running,
            vmm::Event::Resumed => self.stalled = false,
            _ => {}
        }
        if self.stalled && !was {
            log::error!(
                "capsule {}: stands still, because the host's storage is full; make room in {}, then it goes on",
                self.spec.id,
                self.directory.display()
            );
        } else if was && !self.stalled {
            log::info!("capsule {}: goes on", self.spec.id);
        }
    }

    /// Why nothing can be asked of its guest at the moment, for a person.
    pub fn why_stalled(&self) -> Option<&'static str> {
        self.stalled.then_some(
            "the capsule stands still, because its host's storage is full; it goes on by itself when there is \
             room, and has lost nothing",
        )
    }

    /// Lets a guest that stands still go on where there is room again.
    pub fn go_on_if_room(&mut self) {
        if !self.stalled || self.state() != CapsuleState::Running {
            return;
        }
        let Some(machine) = &mut self.machine else { return };
        match disk::has_room(&self.directory) {
            Ok(true) => {
                if let Err(e) = machine.begin_going_on() {
                    log::warn!("capsule {}: letting its guest go on: {e}", self.spec.id);
                }
            }
            Ok(false) => {}
            Err(e) => log::warn!("capsule {}: {e}", self.spec.id),
        }
    }
}
