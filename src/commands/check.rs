//! `otpgate check`: whether the configuration can be used, by the same code that `serve` uses.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use crate::cli::Failure;
use crate::config::Config;
use crate::config::load::ConfigError;
use crate::config::warnings::{Warning, warnings};
use crate::metrics::Metrics;
use crate::net::Certificate;
use crate::proxy::Upstreams;
use crate::remote::Remote;
use crate::store::Store;

/// Arguments of `otpgate check` beside those of `serve`.
#[derive(Clone, Copy, Debug, Args)]
pub struct Form {
    /// Say nothing if all is well
    #[arg(long, short)]
    quiet: bool,
    /// Fail on unsafe settings too
    #[arg(long)]
    strict: bool,
    /// For machines: {"usable", "problems", "warnings"}
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
}

/// Tells what is wrong with what was loaded, what only opening its files shows, and which settings are
/// unsafe; these fail only a strict check.
///
/// # Errors
/// All that cannot be used.
pub fn run(loaded: Result<Config, ConfigError>, form: Form) -> Result<ExitCode, Failure> {
    let config = match loaded {
        Ok(config) => config,
        Err(error) if form.json => {
            return print_json(error.0.iter().map(ToString::to_string).collect(), &[], form);
        }
        Err(error) => return Err(error.into()),
    };
    let problems = problems(&config);
    let warnings = warnings(&config);
    if form.json {
        return print_json(problems, &warnings, form);
    }
    for warning in &warnings {
        super::note(format_args!("otpgate: unsafe: {warning}"));
    }
    if !problems.is_empty() {
        return Err(problems.join("\notpgate: ").into());
    }
    if form.strict && !warnings.is_empty() {
        return Err("the configuration is usable, but unsafe".into());
    }
    if !form.quiet {
        super::print("the configuration is usable")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_json(
    problems: Vec<String>,
    warnings: &[Warning],
    form: Form,
) -> Result<ExitCode, Failure> {
    let usable = problems.is_empty();
    let listed: Vec<_> = warnings.iter().map(|w| json!({ "key": w.key, "text": w.text })).collect();
    let report = json!({ "usable": usable, "problems": problems, "warnings": listed });
    super::print(&report.to_string())?;
    let safe_enough = warnings.is_empty() || !form.strict;
    let good = usable && safe_enough;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What would keep `serve` from starting, addresses that cannot be bound aside.
fn problems(config: &Config) -> Vec<String> {
    let mut problems = Vec::new();
    let listen = [&config.proxy.listen, &config.api.listen, &config.ops.listen];
    for tls in listen.into_iter().flatten().filter_map(|listen| listen.tls.as_ref()) {
        problems.extend(Certificate::load(tls).err().map(|e| e.to_string()));
    }
    problems.extend(match &config.remote {
        None => Store::check(&config.store).err().map(|e| e.to_string()),
        Some(remote) => Remote::check(remote).err().map(|e| e.to_string()),
    });
    problems.extend(crate::logging::check(&config.log).err().map(|e| e.to_string()));
    if !config.proxy.listen.is_empty() {
        let metrics = Arc::new(Metrics::new([]));
        problems.extend(Upstreams::new(&config.proxy, metrics).err().map(|e| e.to_string()));
    }
    problems
}
