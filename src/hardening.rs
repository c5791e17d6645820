//! Keeps the process's memory, which holds every seed, out of core files and away from other processes of
//! the same user.

use std::io;

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

/// Who may see the process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Root alone: no core files, no debuggers, and `/proc/PID/environ`, `maps`, `mem` and `fd` are root's.
    Private,
    /// Every process of its user; core files as far as the hard limit allows.
    Debuggable,
}

/// Sets who may see this process's memory, from now on. It reads its own `/proc/self` either way.
///
/// [`Memory::Debuggable`] can be said after [`Memory::Private`], so the hard limit on core files stays; a
/// process that is not dumpable leaves none whatever the limits, also where a program collects them.
///
/// # Errors
/// If the system refuses, as a sandbox may.
pub fn keep(memory: Memory) -> io::Result<()> {
    let maximum = getrlimit(Resource::Core).maximum;
    let (behavior, current) = match memory {
        Memory::Private => (DumpableBehavior::NotDumpable, Some(0)),
        Memory::Debuggable => (DumpableBehavior::Dumpable, maximum),
    };
    setrlimit(Resource::Core, Rlimit { current, maximum })?;
    Ok(set_dumpable_behavior(behavior)?)
}
