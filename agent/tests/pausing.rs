//! Pausing, resuming and snapshots in the VMM that this machine offers.

mod common;
#[path = "common/lifecycle.rs"]
mod lifecycle;

#[test]
fn a_paused_capsule_goes_on_where_it_was() {
    lifecycle::a_paused_capsule_goes_on_where_it_was();
}

#[test]
fn a_paused_capsule_survives_its_agent() {
    lifecycle::a_paused_capsule_survives_its_agent();
}

#[test]
fn what_fails_leaves_a_capsule_as_it_was() {
    lifecycle::what_fails_leaves_a_capsule_as_it_was();
}

#[test]
fn an_idle_capsule_is_paused_unless_somebody_pings() {
    lifecycle::an_idle_capsule_is_paused_unless_somebody_pings();
}

#[test]
fn a_capsule_hibernates_and_goes_on_where_it_was() {
    lifecycle::a_capsule_hibernates_and_goes_on_where_it_was();
}

#[test]
fn capsules_start_from_a_snapshot_where_it_was_and_are_apart() {
    lifecycle::capsules_start_from_a_snapshot_where_it_was_and_are_apart();
}

#[test]
fn what_a_capsule_does_to_its_disk_has_limits() {
    lifecycle::what_a_capsule_does_to_its_disk_has_limits();
}
