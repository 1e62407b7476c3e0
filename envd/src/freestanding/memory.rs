//! `memcpy` and its kin, which the compiler calls by name.
//!
//! They move 16 bytes at a time with instructions that every x86-64 has. `rep movsb` would be shorter, but
//! it is slow where the guest's instructions are emulated.

/// Copies `n` bytes (rdx) from rsi to rdi, which do not overlap; returns rdi.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    core::arch::naked_asm!(
        "mov rax, rdi",
        "cmp rdx, 16",
        "jb 3f",
        // The last 16 bytes first: the loop may then stop short of them.
        "movups xmm1, [rsi + rdx - 16]",
        "lea r8, [rdi + rdx - 16]",
        "2:",
        "cmp rdi, r8",
        "jae 4f",
        "movups xmm0, [rsi]",
        "movups [rdi], xmm0",
        "add rsi, 16",
        "add rdi, 16",
        "jmp 2b",
        "4:",
        "movups [r8], xmm1",
        "ret",
        // Fewer than 16: two words that may overlap, loaded before either is stored.
        "3:",
        "cmp edx, 8",
        "jb 5f",
        "mov rcx, [rsi]",
        "mov r8, [rsi + rdx - 8]",
        "mov [rdi], rcx",
        "mov [rdi + rdx - 8], r8",
        "ret",
        "5:",
        "cmp edx, 4",
        "jb 6f",
        "mov ecx, [rsi]",
        "mov r8d, [rsi + rdx - 4]",
        "mov [rdi], ecx",
        "mov [rdi + rdx - 4], r8d",
        "ret",
        "6:",
        "test edx, edx",
        "je 7f",
        "movzx ecx, byte ptr [rsi]",
        "movzx r8d, byte ptr [rsi + rdx - 1]",
        "cmp edx, 3",
        "jb 8f",
        "movzx r9d, byte ptr [rsi + 1]",
        "mov [rdi + 1], r9b",
        "8:",
        "mov [rdi], cl",
        "mov [rdi + rdx - 1], r8b",
        "7:",
        "ret",
    )
}

/// Copies `n` bytes (rdx) from rsi to rdi, which may overlap; returns rdi.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    core::arch::naked_asm!(
        "mov rax, rdi",
        "sub rax, rsi",
        // Below the source, or beyond its end: copying upwards is right. Short copies load everything
        // before they store; the loop of memcpy loads the last 16 bytes before it stores anything, and
        // each block before a store can reach it.
        "cmp rax, rdx",
        "jae {memcpy}",
        "mov rax, rdi",
        "cmp rdx, 16",
        "jb {memcpy}",
        // Downwards: the first 16 bytes are kept for the end.
        "movups xmm1, [rsi]",
        "2:",
        "cmp rdx, 16",
        "jbe 3f",
        "movups xmm0, [rsi + rdx - 16]",
        "movups [rdi + rdx - 16], xmm0",
        "sub rdx, 16",
        "jmp 2b",
        "3:",
        "movups [rdi], xmm1",
        "ret",
        memcpy = sym memcpy,
    )
}

/// Sets `n` bytes (rdx) at rdi to the low byte of esi; returns rdi.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, n: usize) -> *mut u8 {
    core::arch::naked_asm!(
        "mov rax, rdi",
        "movzx ecx, sil",
        "mov r8, 0x0101010101010101",
        "imul rcx, r8",
        "cmp rdx, 16",
        "jb 3f",
        "movq xmm0, rcx",
        "punpcklqdq xmm0, xmm0",
        "lea r8, [rdi + rdx - 16]",
        "2:",
        "cmp rdi, r8",
        "jae 4f",
        "movups [rdi], xmm0",
        "add rdi, 16",
        "jmp 2b",
        "4:",
        "movups [r8], xmm0",
        "ret",
        "3:",
        "test edx, edx",
        "je 6f",
        "5:",
        "mov [rdi + rdx - 1], cl",
        "dec rdx",
        "jne 5b",
        "6:",
        "ret",
    )
}

/// Compares `n` bytes (rdx) at rdi and rsi: negative, zero or positive, by the first that differ.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    core::arch::naked_asm!(
        "2:",
        "cmp rdx, 8",
        "jb 3f",
        "mov rax, [rdi]",
        "mov rcx, [rsi]",
        "cmp rax, rcx",
        "jne 4f",
        "add rdi, 8",
        "add rsi, 8",
        "sub rdx, 8",
        "jmp 2b",
        // The byte of the lowest address is the one that counts.
        "4:",
        "bswap rax",
        "bswap rcx",
        "cmp rax, rcx",
        "sbb eax, eax",
        "or eax, 1",
        "ret",
        "3:",
        "test rdx, rdx",
        "je 6f",
        "5:",
        "movzx eax, byte ptr [rdi]",
        "movzx ecx, byte ptr [rsi]",
        "sub eax, ecx",
        "jne 7f",
        "inc rdi",
        "inc rsi",
        "dec rdx",
        "jne 5b",
        "6:",
        "xor eax, eax",
        "7:",
        "ret",
    )
}

/// As `memcmp`, where only equality counts.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    core::arch::naked_asm!("jmp {memcmp}", memcmp = sym memcmp)
}

/// The length of a NUL-terminated string at rdi.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    core::arch::naked_asm!(
        "mov rax, rdi",
        "2:",
        "cmp byte ptr [rax], 0",
        "je 3f",
        "inc rax",
        "jmp 2b",
        "3:",
        "sub rax, rdi",
        "ret",
    )
}
