//! The guest's host name, which is its capsule's id: a copy of a guest takes its own when it learns who it is.

use crate::log::log;
use crate::sys::{Errno, boot, file};
use alloc::vec::Vec;
use core::ffi::CStr;

/// The longest of the files that hold the name, in bytes.
const MAX_FILE: usize = 65_536;
const HOST_NAME: &CStr = c"/etc/hostname";
const HOSTS: &CStr = c"/etc/hosts";

/// The guest was capsule `old` and now is capsule `new`. One that was given a name of its own keeps it.
pub fn follow(old: &[u8], new: &[u8]) {
    let current = file::read_file(c"/proc/sys/kernel/hostname", MAX_FILE).unwrap_or_default();
    if old.is_empty() || new.is_empty() || current.trim_ascii() != old {
        return;
    }
    if let Err(e) = boot::set_host_name(new) {
        log!("cannot set the host name: {e}");
        return;
    }
    for path in [HOST_NAME, HOSTS] {
        let replaced = file::read_file(path, MAX_FILE).map(|text| replace_word(&text, old, new));
        let written = match replaced {
            Ok(Some(text)) => file::write_file(path, &text, 0o644),
            Ok(None) | Err(Errno(libc::ENOENT)) => Ok(()),
            Err(e) => Err(e),
        };
        if let Err(e) = written {
            log!("cannot put the host name into {}: {e}", path.to_string_lossy());
        }
    }
}

/// The text with one word for another wherever it stands between white space; `None` when it is nowhere.
fn replace_word(text: &[u8], old: &[u8], new: &[u8]) -> Option<Vec<u8>> {
    let mut replaced = Vec::with_capacity(text.len() + new.len());
    let mut found = false;
    for piece in text.split_inclusive(u8::is_ascii_whitespace) {
        match piece.strip_prefix(old) {
            Some(rest) if rest.is_empty() || (rest.len() == 1 && rest[0].is_ascii_whitespace()) => {
                found = true;
                replaced.extend_from_slice(new);
                replaced.extend_from_slice(rest);
            }
            _ => replaced.extend_from_slice(piece),
        }
    }
    found.then_some(replaced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_replaced_where_it_is_a_word() {
        let hosts = b"127.0.0.1\tlocalhost\n127.0.1.1\tcl-1\n::1 cl-1 cl-12 x.cl-1\n";
        let expected = b"127.0.0.1\tlocalhost\n127.0.1.1\tcl-22\n::1 cl-22 cl-12 x.cl-1\n";
        assert_eq!(replace_word(hosts, b"cl-1", b"cl-22").as_deref(), Some(&expected[..]));
        assert_eq!(replace_word(b"cl-1", b"cl-1", b"b").as_deref(), Some(&b"b"[..]));
        for text in [&b""[..], b"cl-12\n", b"localhost\n"] {
            assert_eq!(replace_word(text, b"cl-1", b"b"), None);
        }
    }

    #[test]
    fn a_machine_that_is_called_otherwise_keeps_its_name() {
        let name = || file::read_file(c"/proc/sys/kernel/hostname", MAX_FILE).expect("a name");
        let before = name();
        follow(b"no machine is called so", b"cl-2");
        follow(b"", b"cl-2");
        assert_eq!(name(), before);
    }
}
