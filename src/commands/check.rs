//! `otpgate check`: whether the configuration can be used, by the same code that `serve` uses.

use std::process::ExitCode;

use crate::cli::Failure;
use crate::config::Config;
use crate::net::Certificate;

/// The configuration has loaded; checks what only opening its files shows.
///
/// # Errors
/// What cannot be used.
pub fn run(config: &Config, quiet: bool) -> Result<ExitCode, Failure> {
    for listen in
        [&config.proxy.listen, &config.api.listen, &config.ops.listen].into_iter().flatten()
    {
        if let Some(tls) = &listen.tls {
            Certificate::load(tls.clone())?;
        }
    }
    if !quiet {
        super::print("the configuration is usable")?;
    }
    Ok(ExitCode::SUCCESS)
}
