//! Just enough of KVM (linux/kvm.h, Documentation/virt/kvm/api.rst) to run a few instructions in 64-bit
//! mode and see whether they do what they should.

use super::pidfd::{Exit, Process};
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{offset_of, size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// The control device.
pub const DEVICE: &str = "/dev/kvm";

const API_VERSION: libc::c_int = 12;
const KVM_GET_API_VERSION: libc::Ioctl = 0xae00;
const KVM_CREATE_VM: libc::Ioctl = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: libc::Ioctl = 0xae04;
const KVM_GET_SUPPORTED_CPUID: libc::Ioctl = 0xc008_ae05;
const KVM_CREATE_VCPU: libc::Ioctl = 0xae41;
const KVM_SET_USER_MEMORY_REGION: libc::Ioctl = 0x4020_ae46;
const KVM_SET_TSS_ADDR: libc::Ioctl = 0xae47;
const KVM_CREATE_IRQCHIP: libc::Ioctl = 0xae60;
const KVM_RUN: libc::Ioctl = 0xae80;
const KVM_SET_REGS: libc::Ioctl = 0x4090_ae82;
const KVM_GET_SREGS: libc::Ioctl = 0x8138_ae83;
const KVM_SET_SREGS: libc::Ioctl = 0x4138_ae84;
const KVM_SET_CPUID2: libc::Ioctl = 0x4008_ae90;
const KVM_EXIT_IO: u32 = 2;

const MEMORY_BYTES: usize = 0x10000;
const PAGE_TABLES: [u64; 3] = [0x1000, 0x2000, 0x3000];
const CODE: u64 = 0x4000;
/// Where the program puts its result. `PROGRAM` names it, and 0x7000, by number.
const DATA: u64 = 0x6000;
const STACK_TOP: u64 = 0x9000;
/// An address outside the guest's memory for the three pages that Intel's real-mode emulation needs.
const TSS_ADDRESS: libc::c_ulong = 0xfffb_d000;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
/// PE, MP, ET, NE, WP, PG.
const CR0: u64 = 0x8001_0033;
/// PAE, OSFXSR, OSXMMEXCPT, OSXSAVE.
const CR4: u64 = 0x4_0620;
/// LME, LMA.
const EFER: u64 = 0x500;

/// What the program writes to the port in the end.
const RESULT: u32 = 0x1122_3344;
const RESULT_PORT: u16 = 0xf4;
/// `cmpxchg16b` and `xrstor64` are what an emulator that passes for KVM does not know, and what every
/// kernel uses.
const PROGRAM: [u8; 43] = [
    0xbf, 0x00, 0x60, 0x00, 0x00, // mov edi, 0x6000
    0x31, 0xc0, // xor eax, eax
    0x31, 0xd2, // xor edx, edx
    0xbb, 0x44, 0x33, 0x22, 0x11, // mov ebx, 0x11223344
    0x31, 0xc9, // xor ecx, ecx
    0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]
    0xbe, 0x00, 0x70, 0x00, 0x00, // mov esi, 0x7000
    0xb8, 0x03, 0x00, 0x00, 0x00, // mov eax, 3 (x87 and SSE state)
    0x48, 0x0f, 0xae, 0x2e, // xrstor64 [rsi]: all zeros, so the initial state
    0x8b, 0x07, // mov eax, [rdi]
    0x66, 0xba, 0xf4, 0x00, // mov dx, 0xf4
    0xef, // out dx, eax
    0xf4, // hlt
];

/// What did not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Opening the device.
    Open = 1,
    /// Its interface has another version.
    Version,
    /// Making a virtual machine.
    CreateMachine,
    /// Giving it memory.
    Memory,
    /// Making a virtual CPU.
    CreateCpu,
    /// Setting the CPU up for 64-bit mode.
    Registers,
    /// Running the program to its end.
    Run,
    /// The program ended with a wrong result.
    Result,
    /// The process that tried it was killed by the kernel.
    Crash,
    /// It did not end in time.
    Timeout,
}

const STEPS: [Step; 8] = [
    Step::Open,
    Step::Version,
    Step::CreateMachine,
    Step::Memory,
    Step::CreateCpu,
    Step::Registers,
    Step::Run,
    Step::Result,
];

/// Runs the program in a process of its own, which an emulator may hang or kill, for at most `timeout_ms`.
/// The inner result says what did not work.
pub fn try_program(timeout_ms: i32) -> io::Result<Result<(), Step>> {
    // SAFETY: the child makes system calls on its own stack and memory only, neither allocates nor takes a
    // lock, and ends with _exit: it runs none of this process's code that other threads may have been in.
    let pid = super::check(unsafe { libc::fork() })?;
    if pid == 0 {
        let status = match run_program() {
            Ok(()) => 0,
            Err(step) => step as libc::c_int,
        };
        // SAFETY: _exit ends the process at once and runs no handlers.
        unsafe { libc::_exit(status) };
    }
    let mut child = Process::child(pid as u32)?;
    let exit = match child.wait(timeout_ms)? {
        Some(exit) => exit,
        None => {
            child.kill()?;
            child.wait(timeout_ms)?;
            return Ok(Err(Step::Timeout));
        }
    };
    Ok(match exit {
        Exit::Status(0) => Ok(()),
        Exit::Status(status) => Err(STEPS.into_iter().find(|s| *s as i32 == status).unwrap_or(Step::Crash)),
        Exit::Signal(_) | Exit::Unknown => Err(Step::Crash),
    })
}

#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    size: u64,
    address: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    base: u64,
    limit: u32,
    selector: u16,
    kind: u8,
    present: u8,
    dpl: u8,
    db: u8,
    s: u8,
    l: u8,
    g: u8,
    avl: u8,
    unusable: u8,
    padding: u8,
}

#[repr(C)]
struct SpecialRegisters {
    /// cs, ds, es, fs, gs, ss, tr, ldt.
    segments: [Segment; 8],
    descriptor_tables: [u64; 4],
    cr0: u64,
    cr2: u64,
    cr3: u64,
    cr4: u64,
    cr8: u64,
    efer: u64,
    apic_base: u64,
    interrupts: [u64; 4],
}

#[repr(C)]
struct Registers {
    /// rax, rbx, rcx, rdx, rsi, rdi.
    general: [u64; 6],
    rsp: u64,
    /// rbp, r8 to r15.
    rest: [u64; 9],
    rip: u64,
    rflags: u64,
}

const MAX_CPUID_ENTRIES: usize = 256;

#[repr(C)]
struct Cpuid {
    count: u32,
    padding: u32,
    entries: [[u32; 10]; MAX_CPUID_ENTRIES],
}

/// The beginning of struct kvm_run, with the answer to KVM_EXIT_IO.
#[repr(C)]
struct RunState {
    flags_in: [u8; 8],
    exit_reason: u32,
    flags_out: [u8; 20],
    direction: u8,
    size: u8,
    port: u16,
    count: u32,
    data_offset: u64,
}

const _: () = assert!(size_of::<MemoryRegion>() == 0x20 && size_of::<SpecialRegisters>() == 0x138);
const _: () = assert!(size_of::<Registers>() == 0x90 && offset_of!(RunState, direction) == 32);
const _: () = assert!(offset_of!(RunState, data_offset) == 40 && STEPS.len() == Step::Crash as usize - 1);

/// Runs in the forked child: no allocation, no lock, no panic. What it maps goes with the process.
fn run_program() -> Result<(), Step> {
    let kvm: File = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(|_| Step::Open)?;
    if call(&kvm, KVM_GET_API_VERSION, 0, Step::Version)? != API_VERSION {
        return Err(Step::Version);
    }
    let machine = owned(call(&kvm, KVM_CREATE_VM, 0, Step::CreateMachine)?);
    // Only Intel's needs it.
    let _ = call(&machine, KVM_SET_TSS_ADDR, TSS_ADDRESS, Step::CreateMachine);
    // VMMs have it as well. And for the first processor without one KVM changes its own code while machines run,
    // with a word to every processor of the host.
    call(&machine, KVM_CREATE_IRQCHIP, 0, Step::CreateMachine)?;

    let memory = map(-1, MEMORY_BYTES, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, Step::Memory)?;
    let put = |address: u64, value: u64| {
        // SAFETY: all addresses are constants of this file, below MEMORY_BYTES and multiples of 8.
        unsafe { memory.add(address as usize).cast::<u64>().write(value) }
    };
    put(PAGE_TABLES[0], PAGE_TABLES[1] | PRESENT_WRITABLE);
    put(PAGE_TABLES[1], PAGE_TABLES[2] | PRESENT_WRITABLE);
    put(PAGE_TABLES[2], PRESENT_WRITABLE | LARGE_PAGE);
    put(DATA, 0);
    // SAFETY: CODE and the program's length are below MEMORY_BYTES.
    unsafe { ptr::copy_nonoverlapping(PROGRAM.as_ptr(), memory.add(CODE as usize), PROGRAM.len()) };
    let region = MemoryRegion {
        slot: 0,
        flags: 0,
        guest_address: 0,
        size: MEMORY_BYTES as u64,
        address: memory as u64,
    };
    pass(&machine, KVM_SET_USER_MEMORY_REGION, &raw const region, Step::Memory)?;

    let cpu = owned(call(&machine, KVM_CREATE_VCPU, 0, Step::CreateCpu)?);
    set_registers(&kvm, &cpu)?;
    let state_bytes = call(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0, Step::CreateCpu)? as usize;
    if state_bytes < size_of::<RunState>() {
        return Err(Step::CreateCpu);
    }
    let state = map(cpu.as_raw_fd(), state_bytes, libc::MAP_SHARED, Step::CreateCpu)?;
    call(&cpu, KVM_RUN, 0, Step::Run)?;
    // SAFETY: the mapping is at least as long as RunState, page-aligned, and nothing writes to it now.
    let run = unsafe { state.cast::<RunState>().read() };
    if run.exit_reason != KVM_EXIT_IO || run.port != RESULT_PORT || run.size != 4 {
        return Err(Step::Run);
    }
    let offset = run.data_offset as usize;
    if !offset.is_multiple_of(4) || offset > state_bytes - 4 {
        return Err(Step::Run);
    }
    // SAFETY: just checked to be inside the mapping and aligned.
    let result = unsafe { state.add(offset).cast::<u32>().read() };
    if result == RESULT { Ok(()) } else { Err(Step::Result) }
}

fn set_registers(kvm: &impl AsRawFd, cpu: &impl AsRawFd) -> Result<(), Step> {
    // SAFETY: all three are plain integers, for which zero is a value.
    let (mut cpuid, mut special, mut registers): (Cpuid, SpecialRegisters, Registers) = unsafe { zeroed() };
    cpuid.count = MAX_CPUID_ENTRIES as u32;
    pass(kvm, KVM_GET_SUPPORTED_CPUID, &raw mut cpuid, Step::Registers)?;
    pass(cpu, KVM_SET_CPUID2, &raw const cpuid, Step::Registers)?;
    pass(cpu, KVM_GET_SREGS, &raw mut special, Step::Registers)?;
    let flat = Segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        kind: 3,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    special.segments[..6].fill(flat);
    special.segments[0] = Segment { selector: 0x8, kind: 0xb, db: 0, l: 1, ..flat };
    special.cr0 = CR0;
    special.cr3 = PAGE_TABLES[0];
    special.cr4 = CR4;
    special.efer = EFER;
    pass(cpu, KVM_SET_SREGS, &raw const special, Step::Registers)?;
    registers.rip = CODE;
    registers.rsp = STACK_TOP;
    registers.rflags = 2;
    pass(cpu, KVM_SET_REGS, &raw const registers, Step::Registers)?;
    Ok(())
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn call(fd: &impl AsRawFd, request: libc::Ioctl, value: libc::c_ulong, step: Step) -> Result<RawFd, Step> {
    // SAFETY: every request that is passed here takes an integer, or nothing.
    super::check(unsafe { libc::ioctl(fd.as_raw_fd(), request, value) }).map_err(|_| step)
}

fn pass<T>(fd: &impl AsRawFd, request: libc::Ioctl, value: *const T, step: Step) -> Result<RawFd, Step> {
    // SAFETY: every call passes the struct that its request names, whose size is asserted above, and a
    // pointer to a mutable one where the kernel writes.
    super::check(unsafe { libc::ioctl(fd.as_raw_fd(), request, value) }).map_err(|_| step)
}

fn map(fd: RawFd, length: usize, flags: libc::c_int, step: Step) -> Result<*mut u8, Step> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a mapping at an address of the kernel's choice touches nothing that exists.
    let address = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, fd, 0) };
    if address == libc::MAP_FAILED { Err(step) } else { Ok(address.cast()) }
}
