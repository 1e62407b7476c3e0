//! From a start message to a plan: account, environment, candidates for the program, directory.

use crate::sys::spawn::{Plan, Step};
use crate::sys::{Errno, file};
use crate::users::{self, User};
use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use wire::message::{Code, Error, ProcessStart};

/// Where programs are looked for when the environment does not say.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Terminal type when the environment does not say.
const DEFAULT_TERM: &[u8] = b"xterm-256color";
/// The longest tag, in bytes.
const MAX_TAG: usize = 128;
/// The most directories of PATH that are tried.
const MAX_CANDIDATES: usize = 64;

/// What holds for every process of this guest.
#[derive(Debug, Default)]
pub struct Defaults {
    /// Account for requests that name none; empty for `user`, or root where that does not exist.
    pub user: String,
    /// Environment of every process that says which capsule it is in.
    pub identity: Vec<(Vec<u8>, Vec<u8>)>,
    /// Environment of every process that the agent told, beneath the request's own.
    pub told: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether envd is root and can become other users.
    pub is_root: bool,
}

/// An error for an errno, with what was tried.
pub fn errno_error(what: &str, errno: Errno) -> Error {
    Error::with_errno(code_of(errno), errno.0, format!("{what}: {errno}"))
}

/// What kind of failure an errno is to whoever asked.
pub fn code_of(errno: Errno) -> Code {
    match errno.0 {
        libc::ENOENT | libc::ENOTDIR => Code::NotFound,
        libc::EEXIST => Code::AlreadyExists,
        libc::EACCES | libc::EPERM | libc::EROFS => Code::PermissionDenied,
        libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOSPC | libc::EDQUOT => {
            Code::ResourceExhausted
        }
        libc::EISDIR | libc::ENOTEMPTY | libc::EBUSY | libc::ETXTBSY | libc::EXDEV => Code::InvalidState,
        libc::EINVAL | libc::ENAMETOOLONG | libc::E2BIG | libc::ELOOP | libc::ENOEXEC | libc::EFBIG => {
            Code::InvalidRequest
        }
        _ => Code::Internal,
    }
}

/// Whether something cannot be had for the moment, rather than not at all: no reason to tell that it is not
/// there.
pub fn is_shortage(errno: Errno) -> bool {
    code_of(errno) == Code::ResourceExhausted
}

/// Finds the account that a request is for.
pub fn find_user(name: &str, defaults: &Defaults) -> Result<User, Error> {
    let passwd = file::read_file(c"/etc/passwd", users::MAX_FILE)
        .map_err(|e| errno_error("cannot read /etc/passwd", e))?;
    // Without the file there are no supplementary groups.
    let group = file::read_if_any(c"/etc/group", users::MAX_FILE)
        .map_err(|e| errno_error("cannot read /etc/group", e))?;
    let found = match (name, defaults.user.as_str()) {
        ("", "") => users::find(&passwd, &group, "user").or_else(|| users::find(&passwd, &group, "root")),
        ("", default) => users::find(&passwd, &group, default),
        (name, _) => users::find(&passwd, &group, name),
    };
    found.ok_or_else(|| {
        let name = if name.is_empty() { &defaults.user } else { name };
        Error::new(
            Code::NotFound,
            format!("there is no account {name:?} in the capsule: name one that its /etc/passwd has"),
        )
    })
}

fn invalid(text: &str) -> Error {
    Error::new(Code::InvalidRequest, text)
}

fn c_string(bytes: Vec<u8>, what: &str) -> Result<CString, Error> {
    CString::new(bytes).map_err(|_| invalid(&format!("{what} has a NUL byte")))
}

/// A path of the request: a relative one starts at the home directory.
pub fn absolute(path: &[u8], home: &[u8]) -> Vec<u8> {
    if path.starts_with(b"/") {
        return path.to_vec();
    }
    let mut whole = home.to_vec();
    if !path.is_empty() {
        if !whole.ends_with(b"/") {
            whole.push(b'/');
        }
        whole.extend_from_slice(path);
    }
    whole
}

/// Environment: later settings replace earlier ones.
struct Environment(Vec<(Vec<u8>, Vec<u8>)>);

impl Environment {
    fn set(&mut self, name: &[u8], value: &[u8]) {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some((_, old)) => *old = value.to_vec(),
            None => self.0.push((name.to_vec(), value.to_vec())),
        }
    }

    fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_slice())
    }

    fn into_strings(self) -> Result<Vec<CString>, Error> {
        self.0
            .into_iter()
            .map(|(mut name, value)| {
                name.push(b'=');
                name.extend_from_slice(&value);
                c_string(name, "an environment variable")
            })
            .collect()
    }
}

fn environment(request: &ProcessStart, user: &User, defaults: &Defaults) -> Result<Environment, Error> {
    let mut environment = Environment(Vec::new());
    environment.set(b"PATH", DEFAULT_PATH);
    environment.set(b"HOME", &user.home);
    environment.set(b"USER", user.name.as_bytes());
    environment.set(b"LOGNAME", user.name.as_bytes());
    environment.set(b"SHELL", &user.shell);
    if request.terminal_columns > 0 {
        environment.set(b"TERM", DEFAULT_TERM);
    }
    for (name, value) in defaults.identity.iter().chain(&defaults.told) {
        environment.set(name, value);
    }
    for (name, value) in &request.environment {
        if name.is_empty() || name.contains(&b'=') {
            return Err(invalid("an environment variable's name is empty or has an equals sign"));
        }
        environment.set(name, value);
    }
    Ok(environment)
}

/// Paths to try for a program, as execvp(3) has it.
fn candidates(program: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    if program.contains(&b'/') {
        return alloc::vec![program.to_vec()];
    }
    path.split(|b| *b == b':')
        .take(MAX_CANDIDATES)
        .map(|directory| {
            // An empty element is the working directory.
            let mut whole = if directory.is_empty() { b".".to_vec() } else { directory.to_vec() };
            whole.push(b'/');
            whole.extend_from_slice(program);
            whole
        })
        .collect()
}

/// Checks a request and works out what the kernel needs to start it.
pub fn plan(request: &ProcessStart, defaults: &Defaults) -> Result<(Plan, User), Error> {
    let program = request.argv.first().filter(|p| !p.is_empty()).ok_or(invalid("the command is empty"))?;
    if request.tag.len() > MAX_TAG || request.tag.bytes().any(|b| b.is_ascii_control()) {
        return Err(invalid("a tag is at most 128 bytes, without control characters"));
    }
    if !request.tag.is_empty() && request.tag.bytes().all(|b| b.is_ascii_digit()) {
        return Err(invalid("a tag of digits only could not be told from a process id: add a letter"));
    }
    if (request.terminal_columns == 0) != (request.terminal_rows == 0) {
        return Err(invalid("a terminal has both columns and rows, 1 to 65535 each"));
    }
    let user = find_user(&request.user, defaults)?;
    let environment = environment(request, &user, defaults)?;
    let path = environment.get(b"PATH").unwrap_or(DEFAULT_PATH);
    let candidates = candidates(program, path)
        .into_iter()
        .map(|c| c_string(c, "the program's name"))
        .collect::<Result<Vec<_>, _>>()?;
    let mut cwd = c_string(absolute(&request.cwd, &user.home), "the working directory")?;
    if request.cwd.is_empty() && file::metadata_at(file::CURRENT, &cwd, 0).is_err() {
        // As login(1) does for an account whose home is missing.
        cwd = c"/".into();
    }
    let plan = Plan {
        candidates,
        argv: request
            .argv
            .iter()
            .map(|a| c_string(a.0.clone(), "an argument"))
            .collect::<Result<Vec<_>, _>>()?,
        environment: environment.into_strings()?,
        cwd,
        uid: user.uid,
        gid: user.gid,
        groups: user.groups.clone(),
        terminal: request.terminal_columns > 0,
        switch_user: defaults.is_root,
    };
    Ok((plan, user))
}

/// What to tell when a step between fork and exec failed.
pub fn start_error(step: Step, errno: Errno, program: &[u8], cwd: &[u8], user: &str) -> Error {
    let program = String::from_utf8_lossy(program);
    match (step, errno.0) {
        (Step::Exec, libc::ENOENT) if program.contains('/') => {
            errno_error(&format!("cannot run {program}"), errno)
        }
        (Step::Exec, libc::ENOENT) => Error::with_errno(
            Code::NotFound,
            errno.0,
            format!("command not found: {program}: install it, or give its full path"),
        ),
        (Step::Exec, _) => errno_error(&format!("cannot run {program}"), errno),
        (Step::Directory, _) => {
            errno_error(&format!("cannot use the working directory {}", String::from_utf8_lossy(cwd)), errno)
        }
        (Step::Credentials, _) => errno_error(&format!("cannot become user {user}"), errno),
        (Step::Setup, _) => errno_error("cannot set up the process", errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::codec::Bytes;

    fn request(argv: &[&str]) -> ProcessStart {
        ProcessStart { argv: argv.iter().map(|a| Bytes::from(*a)).collect(), ..ProcessStart::default() }
    }

    #[test]
    fn programs_are_looked_for_as_execvp_does() {
        assert_eq!(candidates(b"ls", b"/a:/b"), [b"/a/ls".to_vec(), b"/b/ls".to_vec()]);
        assert_eq!(candidates(b"ls", b":/b"), [b"./ls".to_vec(), b"/b/ls".to_vec()]);
        assert_eq!(candidates(b"x/ls", b"/a"), [b"x/ls".to_vec()]);
    }

    #[test]
    fn paths_start_at_home() {
        assert_eq!(absolute(b"/x", b"/home/user"), b"/x");
        assert_eq!(absolute(b"x/y", b"/home/user"), b"/home/user/x/y");
        assert_eq!(absolute(b"x", b"/"), b"/x");
        assert_eq!(absolute(b"", b"/root"), b"/root");
    }

    #[test]
    fn the_requests_environment_wins_over_defaults() {
        let mut request = request(&["env"]);
        request.user = "root".into();
        request.environment = alloc::vec![("A".into(), "2".into()), ("PATH".into(), "/x".into())];
        let defaults = Defaults {
            identity: alloc::vec![(b"B".to_vec(), b"3".to_vec())],
            told: alloc::vec![(b"A".to_vec(), b"1".to_vec())],
            ..Defaults::default()
        };
        let (plan, user) = plan(&request, &defaults).expect("valid");
        assert_eq!(user.uid, 0);
        let has = |entry: &core::ffi::CStr| plan.environment.iter().any(|e| e.as_c_str() == entry);
        assert!(has(c"A=2") && has(c"B=3") && has(c"PATH=/x") && has(c"HOME=/root") && has(c"USER=root"));
        assert_eq!(plan.candidates, [CString::from(c"/x/env")]);
    }

    #[test]
    fn requests_that_make_no_sense_are_refused() {
        let refused = |change: &dyn Fn(&mut ProcessStart)| {
            let mut request = request(&["true"]);
            request.user = "root".into();
            change(&mut request);
            plan(&request, &Defaults::default()).expect_err("refused").code()
        };
        assert_eq!(refused(&|r| r.argv.clear()), Code::InvalidRequest);
        assert_eq!(refused(&|r| r.argv = alloc::vec!["".into()]), Code::InvalidRequest);
        assert_eq!(refused(&|r| r.argv = alloc::vec!["a".into(), "b\0".into()]), Code::InvalidRequest);
        assert_eq!(refused(&|r| r.tag = "123".into()), Code::InvalidRequest);
        assert_eq!(refused(&|r| r.tag = "x".repeat(129)), Code::InvalidRequest);
        assert_eq!(refused(&|r| r.environment = alloc::vec![("".into(), "b".into())]), Code::InvalidRequest);
        assert_eq!(refused(&|r| r.terminal_rows = 3), Code::InvalidRequest);
        assert_eq!(refused(&|r| r.user = "no-such-account".into()), Code::NotFound);
    }
}
