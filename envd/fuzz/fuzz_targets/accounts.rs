//! `/etc/passwd` and `/etc/group` as a guest may have made them: no panic, and no account that a kernel
//! would take for "leave it as it is". The input is a name, a NUL byte, one file, a NUL byte, the other.
#![no_main]

use envd::users;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(3, |b| *b == 0);
    let name = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let passwd = parts.next().unwrap_or_default();
    let group = parts.next().unwrap_or_default();
    if let Some(user) = users::find(passwd, group, &name) {
        assert!(user.uid != u32::MAX && user.gid != u32::MAX && !user.groups.contains(&u32::MAX));
        assert!(user.groups.contains(&user.gid) && user.groups.len() <= users::MAX_GROUPS);
        // Told by the same file, the id has a name, if not always this one.
        assert!(!users::name_of(passwd, user.uid).is_empty());
    }
    let _ = users::name_of(passwd, data.len() as u32);
});
