//! The `otpgate` program; all of it lives in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    otpgate::cli::main()
}
