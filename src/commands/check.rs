//! `otpgate check`: whether the configuration can be used, by the same code that `serve` uses.

use std::process::ExitCode;
use std::sync::Arc;

use crate::cli::Failure;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::net::Certificate;
use crate::proxy::Upstreams;
use crate::store::Store;

/// The configuration has loaded; checks what only opening its files shows.
///
/// # Errors
/// All that cannot be used.
pub fn run(config: &Config, quiet: bool) -> Result<ExitCode, Failure> {
    let problems = problems(config);
    if !problems.is_empty() {
        return Err(problems.join("\notpgate: ").into());
    }
    if !quiet {
        super::print("the configuration is usable")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What would keep `serve` from starting, addresses that cannot be bound aside.
fn problems(config: &Config) -> Vec<String> {
    let mut problems = Vec::new();
    let listen = [&config.proxy.listen, &config.api.listen, &config.ops.listen];
    for tls in listen.into_iter().flatten().filter_map(|listen| listen.tls.as_ref()) {
        problems.extend(Certificate::load(tls.clone()).err().map(|e| e.to_string()));
    }
    problems.extend(Store::check(&config.store).err().map(|e| e.to_string()));
    if !config.proxy.listen.is_empty() {
        let metrics = Arc::new(Metrics::new([]));
        problems.extend(Upstreams::new(&config.proxy, metrics).err().map(|e| e.to_string()));
    }
    problems
}
