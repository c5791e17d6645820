//! `otpgate check`: whether the configuration can be used, by the same code that `serve` uses.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use crate::cli::Failure;
use crate::config::Config;
use crate::config::load::ConfigError;
use crate::metrics::Metrics;
use crate::net::Certificate;
use crate::proxy::Upstreams;
use crate::store::Store;

/// Arguments of `otpgate check` beside those of `serve`.
#[derive(Clone, Copy, Debug, Args)]
pub struct Form {
    /// Say nothing if all is well
    #[arg(long, short)]
    quiet: bool,
    /// For machines: {"usable", "problems"}
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
}

/// Tells what is wrong with what was loaded, and what only opening its files shows.
///
/// # Errors
/// All that cannot be used.
pub fn run(loaded: Result<Config, ConfigError>, form: Form) -> Result<ExitCode, Failure> {
    let config = match loaded {
        Ok(config) => config,
        Err(error) if form.json => {
            return print_json(error.0.iter().map(ToString::to_string).collect());
        }
        Err(error) => return Err(error.into()),
    };
    let problems = problems(&config);
    if form.json {
        return print_json(problems);
    }
    if !problems.is_empty() {
        return Err(problems.join("\notpgate: ").into());
    }
    if !form.quiet {
        super::print("the configuration is usable")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_json(problems: Vec<String>) -> Result<ExitCode, Failure> {
    let usable = problems.is_empty();
    super::print(&json!({ "usable": usable, "problems": problems }).to_string())?;
    Ok(if usable { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
