//! What a program needs beneath it, without a C library: the first instructions, memory, the end.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`allocator`] | the heap |
//! | [`memory`] | the functions that compiled code expects for copying and comparing bytes |

mod allocator;
mod memory;

use core::ffi::{CStr, c_char};
use core::panic::PanicInfo;
use envd::sys::boot;

/// The most arguments that are looked at.
const MAX_ARGUMENTS: usize = 64;
/// Exit status after a panic, as a shell tells SIGABRT.
const PANICKED: i32 = 134;

/// The first instruction: the kernel gives argc and argv on the stack (System V ABI, AMD64 supplement,
/// section 3.4.1).
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    core::arch::naked_asm!(
        // Ends the chain of frames, and gives the stack the alignment that a call needs.
        "xor ebp, ebp",
        "mov rdi, rsp",
        "and rsp, -16",
        "call {main}",
        "ud2",
        main = sym main,
    )
}

extern "C" fn main(stack: *const usize) -> ! {
    // SAFETY: the kernel puts argc there, then that many pointers to NUL-terminated strings, which stay
    // for the life of the process.
    let arguments = unsafe {
        let count = (*stack).min(MAX_ARGUMENTS);
        core::slice::from_raw_parts(stack.add(1).cast::<*const c_char>(), count)
    };
    let arguments = arguments.iter().skip(1).map(|pointer| {
        // SAFETY: as above.
        let text = unsafe { CStr::from_ptr(*pointer) };
        // No argument of envd's is anything but ASCII.
        text.to_str().unwrap_or("?")
    });
    boot::exit(envd::entry::run(arguments))
}

#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    envd::log::line(format_args!("{info}"));
    boot::exit(PANICKED)
}

/// Named by the unwinding tables of the precompiled `core` and `alloc`; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As `rust_eh_personality`.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    boot::exit(PANICKED)
}
