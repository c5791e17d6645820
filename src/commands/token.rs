//! `otpgate token`: the current token of a seed.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;
use zeroize::Zeroizing;

use crate::cli::{Failure, Usage};
use crate::client::read_seed;
use crate::clock::{Clock as _, SystemClock};
use crate::entry::{Algorithm, Seed};
use crate::otp::{Generator, TokenParams};

/// The variable that may hold the seed.
const SEED_VARIABLE: &str = "OTPGATE_SEED";

/// Arguments of `otpgate token`.
#[derive(Clone, Debug, Args)]
pub struct TokenArgs {
    /// File with the seed in base32, `-` for standard input [default: the variable OTPGATE_SEED]
    #[arg(long, value_name = "FILE")]
    seed_file: Option<PathBuf>,
    /// SHA1, SHA256 or SHA512
    #[arg(long, default_value = "SHA1", ignore_case = true)]
    algorithm: Algorithm,
    /// Digits of the token
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u8).range(6..=8))]
    digits: u8,
    /// Seconds of a time step
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(5..=3600))]
    period: u32,
    /// The token of this Unix time instead of now
    #[arg(long, value_name = "SECONDS")]
    at: Option<u64>,
    /// For machines: {"token", "seconds_left"}
    #[arg(long)]
    json: bool,
}

/// Prints the token.
///
/// # Errors
/// If there is no usable seed.
pub fn run(args: &TokenArgs) -> Result<ExitCode, Failure> {
    let seed = match &args.seed_file {
        Some(path) => read_seed(path)?,
        None => {
            let text = std::env::var(SEED_VARIABLE).map(Zeroizing::new).map_err(|_| {
                Usage(format!("no seed: name a file with --seed-file or set {SEED_VARIABLE}"))
            })?;
            Seed::parse(&text).map_err(|e| format!("the seed in {SEED_VARIABLE} {e}"))?
        }
    };
    let params =
        TokenParams { algorithm: args.algorithm, digits: args.digits, step_seconds: args.period };
    let at = args.at.unwrap_or_else(|| SystemClock.now().unix);
    let generator = Generator::new(&seed, params);
    let token = generator.token_at(at);
    super::print(&if args.json {
        json!({ "token": token, "seconds_left": generator.seconds_left(at) }).to_string()
    } else {
        token
    })?;
    Ok(ExitCode::SUCCESS)
}
