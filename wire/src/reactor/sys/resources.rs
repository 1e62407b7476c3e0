//! Resource limits: getrlimit(2), setrlimit(2).

use std::io;

/// Raises the number of files that may be open to the hard limit and returns it.
///
/// # Errors
/// What the kernel says.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` outlives the call, which fills it.
    super::check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is initialised and only read.
    super::check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    Ok(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    #[test]
    fn files_may_be_open() {
        assert!(super::raise_open_files().expect("limit") > 0);
    }
}
