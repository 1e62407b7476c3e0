//! What the agent tells the guest after its start and after each resume: the time, randomness, defaults.

use crate::process::request::{Defaults, errno_error};
use crate::sys::clock;
use alloc::vec::Vec;
use wire::message::{Code, Error, GuestInit};

/// A clock that is further off than this is stepped; less is chronyd's to slew.
const MAX_CLOCK_ERROR_US: u64 = 100_000;
/// Random bytes that are taken at most.
const MAX_ENTROPY: usize = 512;
/// Environment variables that are taken at most.
const MAX_ENVIRONMENT: usize = 1024;

/// Does what the message says. The randomness comes first: everything after may depend on it.
pub fn initialise(init: &GuestInit, defaults: &mut Defaults) -> Result<(), Error> {
    if init.environment.len() > MAX_ENVIRONMENT || init.entropy.len() > MAX_ENTROPY {
        return Err(Error::new(
            Code::InvalidRequest,
            "at most 1024 environment variables and 512 bytes of entropy are taken",
        ));
    }
    if init.environment.iter().any(|(name, _)| name.is_empty() || name.contains(&b'=')) {
        return Err(Error::new(
            Code::InvalidRequest,
            "an environment variable's name is empty or has an equals sign",
        ));
    }
    if !init.entropy.is_empty() && defaults.is_root {
        // Two guests that were resumed from one snapshot must not draw the same numbers.
        clock::add_randomness(&init.entropy).map_err(|e| errno_error("cannot reseed the random pool", e))?;
    }
    if init.time_us > 0 && defaults.is_root && clock::wall_us().abs_diff(init.time_us) > MAX_CLOCK_ERROR_US {
        clock::set_wall_us(init.time_us).map_err(|e| errno_error("cannot set the clock", e))?;
    }
    if !init.default_user.is_empty() {
        // It is looked up now, so that a mistake shows here and not at every command.
        crate::process::request::find_user(&init.default_user, defaults)?;
    }
    defaults.user = init.default_user.clone();
    defaults.told = init.environment.iter().map(|(n, v)| (n.0.clone(), v.0.clone())).collect();
    Ok(())
}

/// The identity variables of every process, the capsule's id first.
pub fn identity_environment(metadata: &crate::metadata::Metadata) -> Vec<(Vec<u8>, Vec<u8>)> {
    [("WRENN_SANDBOX_ID", &metadata.instance_id), ("WRENN_TEMPLATE_ID", &metadata.env_id)]
        .iter()
        .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_replaced_as_a_whole() {
        let mut defaults = Defaults::default();
        let init = GuestInit { environment: alloc::vec![("A".into(), "1".into())], ..GuestInit::default() };
        assert_eq!(initialise(&init, &mut defaults), Ok(()));
        assert_eq!(defaults.told, [(b"A".to_vec(), b"1".to_vec())]);
        assert_eq!(initialise(&GuestInit::default(), &mut defaults), Ok(()));
        assert!(defaults.told.is_empty());
        let bad = GuestInit { default_user: "no-such-account".into(), ..GuestInit::default() };
        assert_eq!(initialise(&bad, &mut defaults).map_err(|e| e.code()), Err(Code::NotFound));
        let bad = GuestInit { environment: alloc::vec![("A=".into(), "1".into())], ..GuestInit::default() };
        assert!(initialise(&bad, &mut defaults).is_err());
    }
}
