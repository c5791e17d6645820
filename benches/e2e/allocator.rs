//! The allocator of this program's processes: the system's, which is pingora's if nobody chooses another, or the
//! gate's, to tell what that alone brings.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::CStr;
use std::sync::atomic::{AtomicU8, Ordering};

use mimalloc::MiMalloc;

/// In the environment of processes that are to have the gate's.
pub(crate) const OURS: &str = match NAME.to_str() {
    Ok(name) => name,
    Err(_) => panic!("it is ASCII"),
};
const NAME: &CStr = c"BENCH_OUR_ALLOCATOR";

/// The one or the other, from the first allocation on.
struct Chosen(AtomicU8);

const UNKNOWN: u8 = 0;
const SYSTEM: u8 = 1;
const GATES: u8 = 2;

#[global_allocator]
static ALLOCATOR: Chosen = Chosen(AtomicU8::new(UNKNOWN));

impl Chosen {
    /// A branch that is always the same, so that it costs next to nothing.
    #[inline]
    fn is_gates(&self) -> bool {
        match self.0.load(Ordering::Relaxed) {
            UNKNOWN => {
                // SAFETY: getenv allocates nothing, and nothing changes the environment this early.
                let is_set = unsafe { !libc::getenv(NAME.as_ptr()).is_null() };
                self.0.store(if is_set { GATES } else { SYSTEM }, Ordering::Relaxed);
                is_set
            }
            which => which == GATES,
        }
    }
}

// SAFETY: all is passed on as it came, always to the same allocator.
unsafe impl GlobalAlloc for Chosen {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe { if self.is_gates() { MiMalloc.alloc(layout) } else { System.alloc(layout) } }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe {
            if self.is_gates() {
                MiMalloc.dealloc(pointer, layout)
            } else {
                System.dealloc(pointer, layout)
            }
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe {
            if self.is_gates() {
                MiMalloc.realloc(pointer, layout, size)
            } else {
                System.realloc(pointer, layout, size)
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe {
            if self.is_gates() {
                MiMalloc.alloc_zeroed(layout)
            } else {
                System.alloc_zeroed(layout)
            }
        }
    }
}
