//! The heap of a program with one thread: free lists by size, and pages from the kernel for what is large.
//!
//! A block belongs to the smallest size class that holds it. Free blocks of a class form a list; when it is
//! empty, blocks are cut from a chunk of pages. Blocks over the largest class are mappings of their own,
//! which go back to the kernel when they are freed.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;
use envd::sys::memory;

/// Block sizes, in bytes: multiples of 16, at most half as large again as the one before.
const CLASSES: [usize; 21] = [
    16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384,
    32768,
];
/// Every block of a class has at least this alignment.
const ALIGNMENT: usize = 16;
/// Pages taken from the kernel at a time, in bytes.
const CHUNK: usize = 64 * 1024;
const PAGE: usize = 4096;

struct Heap {
    free: [*mut u8; CLASSES.len()],
    chunk: *mut u8,
    chunk_left: usize,
}

/// The allocator.
struct Allocator(UnsafeCell<Heap>);

// SAFETY: envd has one thread, and no signal handlers.
unsafe impl Sync for Allocator {}

#[global_allocator]
static ALLOCATOR: Allocator =
    Allocator(UnsafeCell::new(Heap { free: [null_mut(); CLASSES.len()], chunk: null_mut(), chunk_left: 0 }));

/// The class for a layout; `None` when it gets pages of its own.
fn class_of(layout: &Layout) -> Option<usize> {
    if layout.align() > ALIGNMENT {
        return None;
    }
    CLASSES.iter().position(|size| *size >= layout.size())
}

fn page_rounded(size: usize) -> usize {
    // A layout's size is at most isize::MAX, so this does not overflow.
    (size + PAGE - 1) & !(PAGE - 1)
}

impl Heap {
    fn take(&mut self, class: usize) -> *mut u8 {
        let block = self.free[class];
        if !block.is_null() {
            // SAFETY: a free block holds the pointer to the next one.
            self.free[class] = unsafe { block.cast::<*mut u8>().read() };
            return block;
        }
        let size = CLASSES[class];
        if self.chunk_left < size {
            self.retire_chunk();
            let chunk = memory::map(CHUNK);
            if chunk.is_null() {
                return null_mut();
            }
            self.chunk = chunk;
            self.chunk_left = CHUNK;
        }
        let block = self.chunk;
        // SAFETY: `size` bytes are left in the chunk.
        self.chunk = unsafe { self.chunk.add(size) };
        self.chunk_left -= size;
        block
    }

    /// Makes blocks of what is left of a chunk, the largest that fit.
    fn retire_chunk(&mut self) {
        for class in (0..CLASSES.len()).rev() {
            while self.chunk_left >= CLASSES[class] {
                let block = self.chunk;
                // SAFETY: the block is within the chunk and belongs to nobody.
                unsafe {
                    self.chunk = self.chunk.add(CLASSES[class]);
                    self.give(class, block);
                }
                self.chunk_left -= CLASSES[class];
            }
        }
    }

    /// # Safety
    /// The block is of the class and in no other use.
    unsafe fn give(&mut self, class: usize, block: *mut u8) {
        // SAFETY: every block has room for a pointer, and its alignment.
        unsafe { block.cast::<*mut u8>().write(self.free[class]) };
        self.free[class] = block;
    }
}

// SAFETY: blocks are distinct, large and aligned enough for their layout, and stay until they are freed.
// Pages are aligned to more than any layout of envd's asks for; a larger alignment is refused.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match class_of(&layout) {
            // SAFETY: one thread, and no call to the allocator from within it.
            Some(class) => unsafe { (*self.0.get()).take(class) },
            None if layout.align() > PAGE => null_mut(),
            None => memory::map(page_rounded(layout.size())),
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match class_of(&layout) {
            // SAFETY: as above; the caller gives up the block.
            Some(class) => unsafe { (*self.0.get()).give(class, block) },
            // SAFETY: the block is a mapping of this length that the caller gives up.
            None => unsafe { memory::unmap(block, page_rounded(layout.size())) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller's.
        let block = unsafe { self.alloc(layout) };
        // Fresh pages are zero already.
        if !block.is_null() && class_of(&layout).is_some() {
            // SAFETY: the block has that many bytes.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller answers for size and alignment.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        match (class_of(&layout), class_of(&new_layout)) {
            (Some(old), Some(new)) if old == new => return block,
            (None, None) => {
                let (old, new) = (page_rounded(layout.size()), page_rounded(new_size));
                // SAFETY: the block is a mapping of the old length that the caller gives up.
                return unsafe { memory::remap(block, old, new) };
            }
            _ => {}
        }
        // SAFETY: both blocks have at least the bytes that are copied, and are distinct.
        unsafe {
            let new_block = self.alloc(new_layout);
            if !new_block.is_null() {
                new_block.copy_from_nonoverlapping(block, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
            new_block
        }
    }
}
