//! Accounts from `/etc/passwd` and `/etc/group` (passwd(5), group(5)), read as they are: a static
//! program has no name service.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// The most supplementary groups of a user that are taken over.
pub const MAX_GROUPS: usize = 1024;
/// Bytes of either file that are looked at.
pub const MAX_FILE: usize = 1024 * 1024;

/// One account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids, the primary one among them.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: Vec<u8>,
    /// Login shell; `/bin/sh` where the field is empty.
    pub shell: Vec<u8>,
}

/// Lines of a colon-separated file as fields. Lines that are empty or comments are left out.
fn records(file: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    file.split(|b| *b == b'\n')
        .filter(|line| !line.is_empty() && line[0] != b'#')
        .map(|line| line.split(|b| *b == b':').collect())
}

/// A decimal number without sign or blanks.
pub fn number(field: &[u8]) -> Option<u32> {
    if field.is_empty() || field.len() > 10 || !field.iter().all(u8::is_ascii_digit) {
        return None;
    }
    core::str::from_utf8(field).ok()?.parse().ok()
}

/// Finds an account by name, or by number where no account has that name.
pub fn find(passwd: &[u8], group: &[u8], name: &str) -> Option<User> {
    let by_name = |fields: &Vec<&[u8]>| fields[0] == name.as_bytes();
    let wanted = number(name.as_bytes());
    let by_number =
        |fields: &Vec<&[u8]>| wanted.is_some() && fields.get(2).copied().and_then(number) == wanted;
    let fields =
        records(passwd).find(by_name).or_else(|| records(passwd).find(by_number)).filter(|f| f.len() >= 7)?;
    let uid = number(fields[2])?;
    let gid = number(fields[3])?;
    // The ids that mean "unchanged" to chown(2) and setresuid(2) belong to nobody.
    if uid == u32::MAX || gid == u32::MAX {
        return None;
    }
    let name = core::str::from_utf8(fields[0]).ok().filter(|n| !n.is_empty())?.to_string();
    let or = |field: &[u8], other: &[u8]| if field.is_empty() { other.to_vec() } else { field.to_vec() };
    Some(User {
        groups: groups_of(group, &name, gid),
        uid,
        gid,
        home: or(fields[5], b"/"),
        shell: or(fields[6], b"/bin/sh"),
        name,
    })
}

fn groups_of(group: &[u8], name: &str, primary: u32) -> Vec<u32> {
    let mut groups = alloc::vec![primary];
    for fields in records(group) {
        let [_, _, id, members, ..] = fields[..] else { continue };
        let Some(id) = number(id).filter(|id| *id != u32::MAX) else { continue };
        let is_member = members.split(|b| *b == b',').any(|member| member == name.as_bytes());
        if is_member && !groups.contains(&id) && groups.len() < MAX_GROUPS {
            groups.push(id);
        }
    }
    groups
}

/// The name with this id in either file, or the number in decimal.
pub fn name_of(file: &[u8], id: u32) -> String {
    records(file)
        .find(|fields| fields.get(2).copied().and_then(number) == Some(id))
        .and_then(|fields| core::str::from_utf8(fields[0]).ok().filter(|name| !name.is_empty()))
        .map_or_else(|| id.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\n\
        # a comment\n\
        user:x:1000:1000:,,,:/home/user:/bin/bash\n\
        bare:x:1001:1001:::\n\
        broken:x:one:1:::\n\
        short:x:5\n\
        nobody4:x:4294967295:1::/:/bin/sh\n";
    const GROUP: &[u8] = b"root:x:0:\nsudo:x:27:user\nusers:x:100:other,user,more\nodd:x:x:user\n\
        user:x:1000:user\nlast:x:7:user2";

    #[test]
    fn accounts_are_found_with_all_their_groups() {
        let user = find(PASSWD, GROUP, "user").expect("there");
        assert_eq!((user.uid, user.gid), (1000, 1000));
        assert_eq!(user.groups, [1000, 27, 100]);
        assert_eq!(user.home, b"/home/user");
        assert_eq!(find(PASSWD, GROUP, "root").expect("there").home, b"/root");
        let bare = find(PASSWD, GROUP, "1001").expect("by number");
        assert_eq!(
            (bare.name.as_str(), &bare.home[..], &bare.shell[..]),
            ("bare", &b"/"[..], &b"/bin/sh"[..])
        );
    }

    #[test]
    fn malformed_and_reserved_accounts_are_nobodys() {
        for name in ["", "nobody", "broken", "short", "nobody4", "4294967295", "# a comment", "-1"] {
            assert_eq!(find(PASSWD, GROUP, name), None, "{name}");
        }
    }

    #[test]
    fn ids_have_names_where_there_are_some() {
        assert_eq!(name_of(PASSWD, 1000), "user");
        assert_eq!(name_of(GROUP, 27), "sudo");
        assert_eq!(name_of(GROUP, 4242), "4242");
        assert_eq!(name_of(b":x:7:7::/:\n", 7), "7");
    }
}
