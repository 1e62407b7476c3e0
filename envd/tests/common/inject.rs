//! Makes the system calls of a running program fail, or do less than they were asked to, by ptrace(2).
//!
//! The program is the real one: it cannot tell an injected result from the kernel's. Only its own calls are
//! touched, not those of what it starts.

#![allow(dead_code)]

use std::io::Error;
use std::mem::{size_of, zeroed};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// What is done to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is not made, and this is its error.
    Errno(i32),
    /// It is made with a smaller count of bytes, one at least.
    Short,
}

/// One kind of call, and how often what is done to it.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// The call's number.
    pub call: i64,
    /// Which of its calls, by the program's process id and the call's arguments.
    pub applies: fn(i32, [u64; 6]) -> bool,
    /// What is done.
    pub fault: Fault,
    /// To one in so many, by chance.
    pub one_in: u64,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    random: u64,
    injected: usize,
    stop: bool,
}

impl State {
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit.max(1)
    }

    /// What is to be done to a call that is about to be made.
    fn decide(&mut self, pid: i32, call: i64, arguments: [u64; 6]) -> Option<Decision> {
        for index in 0..self.rules.len() {
            let rule = self.rules[index];
            if rule.call != call || !(rule.applies)(pid, arguments) || self.below(rule.one_in) != 0 {
                continue;
            }
            let count = arguments[COUNT];
            let decision = match rule.fault {
                Fault::Errno(errno) => Decision::Fail(errno),
                Fault::Short if count > 1 => Decision::Shorten { from: count, to: 1 + self.below(count - 1) },
                Fault::Short => continue,
            };
            self.injected += 1;
            return Some(decision);
        }
        None
    }
}

/// The argument that is a count of bytes, in all calls that [`Fault::Short`] is for.
const COUNT: usize = 2;

enum Decision {
    Fail(i32),
    Shorten { from: u64, to: u64 },
}

/// Traces a program until it is dropped; then the program runs on undisturbed.
pub struct Injector {
    state: Arc<Mutex<State>>,
    tracer: Option<JoinHandle<()>>,
}

impl Injector {
    /// Takes hold of a program that runs. Nothing is done to it yet.
    pub fn attach(pid: u32, seed: u64) -> Injector {
        let pid = pid as i32;
        let state = Arc::new(Mutex::new(State { random: seed | 1, ..State::default() }));
        let (held, wait) = channel();
        let shared = Arc::clone(&state);
        // The kernel takes a tracer to be one thread.
        let tracer = std::thread::spawn(move || {
            seize(pid);
            held.send(()).expect("the test waits");
            trace(pid, &shared);
        });
        wait.recv().expect("the program is held");
        Injector { state, tracer: Some(tracer) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the tracer has not failed")
    }

    /// From now on these rules hold, the first that fits.
    pub fn set(&self, rules: &[Rule]) {
        self.state().rules = rules.to_vec();
    }

    /// How many calls something was done to.
    pub fn injected(&self) -> usize {
        self.state().injected
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        if let Ok(mut state) = self.state.lock() {
            state.stop = true;
        }
        // The program makes some call once a second at least, and the tracer has its turn.
        if let Some(tracer) = self.tracer.take() {
            let result = tracer.join();
            assert!(result.is_ok() || std::thread::panicking(), "the tracer failed");
        }
    }
}

fn request(what: libc::c_uint, pid: i32, address: usize, data: usize) -> libc::c_long {
    // SAFETY: the callers pass pointers to what the request reads or fills in, or integers.
    unsafe { libc::ptrace(what, pid, address, data) }
}

fn seize(pid: i32) {
    let options = libc::PTRACE_O_TRACESYSGOOD as usize;
    assert_eq!(request(libc::PTRACE_SEIZE, pid, 0, options), 0, "seize: {}", Error::last_os_error());
    assert_eq!(request(libc::PTRACE_INTERRUPT, pid, 0, 0), 0, "interrupt: {}", Error::last_os_error());
}

/// The status of the next stop; `None` when the program has ended. Its end is left to its parent to see.
fn next_stop(pid: i32) -> Option<i32> {
    // SAFETY: an all-zero siginfo is valid, and lives for the call.
    let (result, code) = unsafe {
        let mut info: libc::siginfo_t = zeroed();
        let flags = libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT | libc::__WALL;
        (libc::waitid(libc::P_PID, pid as u32, &mut info, flags), info.si_code)
    };
    if result != 0 || matches!(code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED) {
        return None;
    }
    let mut status = 0;
    // SAFETY: the status lives for the call.
    let got = unsafe { libc::waitpid(pid, &mut status, libc::__WALL) };
    (got == pid && libc::WIFSTOPPED(status)).then_some(status)
}

fn trace(pid: i32, state: &Mutex<State>) {
    let mut pending = None;
    while let Some(status) = next_stop(pid) {
        let signal = libc::WSTOPSIG(status);
        let event = status >> 16;
        let mut deliver = 0;
        if signal == libc::SIGTRAP | 0x80 {
            let Some(entering) = is_entry(pid) else { return };
            if entering {
                pending = enter(pid, state);
            } else if let Some(decision) = pending.take() {
                leave(pid, &decision);
            }
        } else if event == 0 {
            deliver = signal;
        }
        // Never between the two halves of a call that something is done to.
        let stop = state.lock().map_or(true, |s| s.stop) && pending.is_none();
        let next = if stop { libc::PTRACE_DETACH } else { libc::PTRACE_SYSCALL };
        request(next, pid, 0, deliver as usize);
        if stop {
            return;
        }
    }
}

/// Whether the program is about to make its call, rather than back from it.
fn is_entry(pid: i32) -> Option<bool> {
    // SAFETY: an all-zero struct is valid.
    let mut info: libc::ptrace_syscall_info = unsafe { zeroed() };
    let got = request(
        libc::PTRACE_GET_SYSCALL_INFO,
        pid,
        size_of::<libc::ptrace_syscall_info>(),
        &raw mut info as usize,
    );
    (got > 0).then_some(info.op == libc::PTRACE_SYSCALL_INFO_ENTRY)
}

fn registers(pid: i32) -> Option<libc::user_regs_struct> {
    // SAFETY: an all-zero struct is valid.
    let mut registers: libc::user_regs_struct = unsafe { zeroed() };
    (request(libc::PTRACE_GETREGS, pid, 0, &raw mut registers as usize) == 0).then_some(registers)
}

fn set_registers(pid: i32, registers: &libc::user_regs_struct) {
    // It fails only when the program was killed meanwhile, and then nothing matters.
    request(libc::PTRACE_SETREGS, pid, 0, std::ptr::from_ref(registers) as usize);
}

fn enter(pid: i32, state: &Mutex<State>) -> Option<Decision> {
    let mut r = registers(pid)?;
    let arguments = [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9];
    let decision = state.lock().ok()?.decide(pid, r.orig_rax as i64, arguments)?;
    match decision {
        // A call that does not exist is made in its place.
        Decision::Fail(_) => r.orig_rax = u64::MAX,
        Decision::Shorten { to, .. } => r.rdx = to,
    }
    set_registers(pid, &r);
    Some(decision)
}

fn leave(pid: i32, decision: &Decision) {
    let Some(mut r) = registers(pid) else { return };
    match decision {
        Decision::Fail(errno) => r.rax = (-i64::from(*errno)) as u64,
        // The program counts on its registers.
        Decision::Shorten { from, .. } => r.rdx = *from,
    }
    set_registers(pid, &r);
}
