//! The command line: what there is to type, and which command runs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::commands;
use crate::commands::serve::Source;
use crate::config::Config;
use crate::config::load::{self, ConfigError, Files, Flag, Loaded};
use crate::hardening::{self, Memory};

/// A reverse-proxy auth sidecar: lets through only requests whose one-time token proves who sends
/// them.
#[derive(Debug, Parser)]
#[command(name = "otpgate", version, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done, 1 refused or failed, 2 usage.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gate
    ///
    /// SIGTERM and SIGINT stop it; SIGUSR2 starts the program anew, which takes over without a failed request.
    Serve(RunArgs),
    /// Show the gate at work: a temporary store, a small upstream, real calls
    Demo(commands::demo::DemoArgs),
    /// Tell whether the configuration can be used
    Check(CheckArgs),
    /// Print the current token of a seed
    Token(commands::token::TokenArgs),
    /// Manage entries and verify tokens through the API of a running gate
    // By far the largest.
    Client(Box<commands::client::ClientArgs>),
    /// Work on the store directly, also while gates run on it
    Store(commands::store::StoreArgs),
    /// Tell which route governs a request, and what follows from it
    Explain(commands::explain::ExplainArgs),
    /// Ask a running gate whether it is healthy; exit code 0 if it is
    Healthcheck(commands::healthcheck::HealthcheckArgs),
    /// Print the script that lets a shell complete this command line
    Completions(commands::manual::CompletionsArgs),
    /// Print the manual page
    Man(commands::manual::ManArgs),
}

/// Where settings come from, for every command that needs them.
#[derive(Clone, Debug, Default, Args)]
pub struct Settings {
    /// Configuration file [default: /etc/otpgate/otpgate.toml if it exists]
    #[arg(long, value_name = "FILE", env = "OTPGATE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Store URL: sqlite:PATH, redis://, rediss://, redis+unix:, redis-sentinel://, redis-cluster://
    ///
    /// A password is better put into `store.url_file` or OTPGATE_STORE__URL: arguments show in the
    /// list of processes.
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// File with the key that seals entries in the store
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

impl Settings {
    fn flags(&self) -> Vec<Flag> {
        let key_file = self.key_file.as_ref().map(|path| path.display().to_string());
        [
            Flag::given("--store", "store.url", self.store.as_ref()),
            Flag::given("--key-file", "store.key_file", key_file.as_ref()),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Reads the configuration.
    ///
    /// # Errors
    /// Every problem of it.
    pub fn load(&self) -> Result<Config, ConfigError> {
        self.load_with(Vec::new())
    }

    /// Reads the configuration for work on the store.
    ///
    /// # Errors
    /// As [`Self::load`]; if there is no store.
    pub fn load_store(&self) -> Result<Config, Failure> {
        let config = self.load()?;
        if config.remote.is_some() {
            return Err(Usage(
                "the configuration has [remote], and so no store: name another one with --config"
                    .into(),
            )
            .into());
        }
        Ok(config)
    }

    /// As [`Self::load`], with flags of a command's own.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub(crate) fn load_with(&self, more: Vec<Flag>) -> Result<Config, ConfigError> {
        self.load_noting_files(more, Files::Any).config
    }

    fn load_noting_files(&self, more: Vec<Flag>, may_name: Files) -> Loaded {
        let flags: Vec<_> = self.flags().into_iter().chain(more).collect();
        load::load_noting_files(self.config.as_deref(), std::env::vars_os(), &flags, may_name)
    }
}

/// What `serve` and `check` share.
#[derive(Clone, Debug, Default, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    settings: Settings,
    /// Another server that checks tokens, in place of a store: https://, http:// or unix:/PATH
    #[arg(long, value_name = "URL", conflicts_with_all = ["store", "key_file"])]
    remote: Option<String>,
    /// Upstream: HOST:PORT, http://, https://, h2c://, h2:// or unix:/PATH [default: 127.0.0.1:9000]
    #[arg(long, value_name = "URL")]
    upstream: Option<String>,
    /// Where the proxy listens: IP:PORT, unix:/PATH or off [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS")]
    proxy: Option<String>,
    /// Where the API listens [default: 127.0.0.1:8081]
    #[arg(long, value_name = "ADDRESS")]
    api: Option<String>,
    /// Where health checks and metrics are served [default: 127.0.0.1:9464]
    #[arg(long, value_name = "ADDRESS")]
    ops: Option<String>,
    /// error, warn, info, debug or trace, also per module [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// text or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
}

impl ServeArgs {
    fn load(&self, may_name: Files) -> Loaded {
        let flags = [
            Flag::given("--remote", "remote.url", self.remote.as_ref()),
            Flag::given("--upstream", "proxy.upstream", self.upstream.as_ref()),
            Flag::given("--proxy", "proxy.listen", self.proxy.as_ref()),
            Flag::given("--api", "api.listen", self.api.as_ref()),
            Flag::given("--ops", "ops.listen", self.ops.as_ref()),
            Flag::given("--log-level", "log.level", self.log_level.as_ref()),
            Flag::given("--log-format", "log.format", self.log_format.as_ref()),
        ];
        self.settings.load_noting_files(flags.into_iter().flatten().collect(), may_name)
    }
}

#[derive(Clone, Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    serve: ServeArgs,
    /// Take over from the gate that starts this one
    #[arg(long, hide = true)]
    takeover: bool,
}

#[derive(Clone, Debug, Args)]
struct CheckArgs {
    #[command(flatten)]
    serve: ServeArgs,
    #[command(flatten)]
    form: commands::check::Form,
}

/// Why a command failed, for standard error.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A command was called in a way that cannot be meant.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Parses the command line and runs what it asks for.
#[must_use]
pub fn main() -> ExitCode {
    // Before anything secret is read.
    keep(Memory::Private);
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(failure) => {
            commands::note(format_args!("otpgate: {failure}"));
            if failure.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Carries on without: a sandbox may forbid it, and refusing to start would protect nobody.
fn keep(memory: Memory) {
    if let Err(error) = hardening::keep(memory) {
        commands::note(format_args!(
            "otpgate: cannot keep other processes from reading this one's memory: {error}"
        ));
    }
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Serve(args) => {
            let takes_over = args.takeover;
            let (source, config) = Source::begin(move |may_name| args.serve.load(may_name))?;
            if config.process.core_dumps {
                keep(Memory::Debuggable);
            }
            commands::serve::run(config, source, takes_over)
        }
        Command::Demo(args) => commands::demo::run(&args),
        Command::Check(args) => commands::check::run(args.serve.load(Files::Any).config, args.form),
        Command::Token(args) => commands::token::run(&args),
        Command::Client(args) => commands::block_on(async {
            Ok(commands::client::run(*args).await.unwrap_or_else(|error| {
                commands::note(format_args!("otpgate: {error}"));
                error.exit_code()
            }))
        }),
        Command::Store(args) => commands::store::run(args),
        Command::Explain(args) => commands::explain::run(&args),
        Command::Healthcheck(args) => commands::block_on(commands::healthcheck::run(args)),
        Command::Completions(args) => commands::manual::completions(&args, Cli::command()),
        Command::Man(args) => commands::manual::man(&args, Cli::command()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// But for those whose output is no result: a running gate, a show, a script, manual pages.
    #[test]
    fn every_result_is_there_for_machines() {
        fn walk(command: &clap::Command, without: &mut Vec<String>) {
            let mut own = command.get_subcommands().filter(|c| c.get_name() != "help").peekable();
            let flags = |arg: &clap::Arg| arg.get_long() == Some("json");
            if own.peek().is_none() && !command.get_arguments().any(flags) {
                without.push(command.get_name().to_owned());
            }
            own.for_each(|command| walk(command, without));
        }
        let (mut without, mut cli) = (Vec::new(), Cli::command());
        cli.build();
        walk(&cli, &mut without);
        assert_eq!(without, ["serve", "demo", "completions", "man"]);
    }

    #[test]
    fn every_command_and_flag_has_help() {
        fn walk(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
            }
            command.get_subcommands().for_each(walk);
        }
        walk(&Cli::command());
    }
}
