//! `otpgate completions` and `otpgate man`: what the shell and `man` know of the command line, made of it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Command};
use clap_complete::Shell;

use crate::cli::Failure;

/// Arguments of `otpgate completions`.
#[derive(Clone, Debug, Args)]
pub struct CompletionsArgs {
    /// Which shell
    shell: Shell,
}

/// Arguments of `otpgate man`.
#[derive(Clone, Debug, Args)]
pub struct ManArgs {
    /// Write a page for each command into this folder, instead of the first one to standard output
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

/// Prints the script that makes the shell complete `otpgate`.
///
/// # Errors
/// If nothing takes it.
pub fn completions(args: &CompletionsArgs, mut command: Command) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "otpgate", &mut script);
    super::print(String::from_utf8(script)?.trim_end())?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the manual page, or writes those of all commands.
///
/// # Errors
/// If nothing takes them.
pub fn man(args: &ManArgs, mut command: Command) -> Result<ExitCode, Failure> {
    command.build();
    match &args.out {
        None => super::print(page(&command)?.1.trim_end())?,
        Some(folder) => {
            std::fs::create_dir_all(folder)
                .map_err(|e| format!("cannot make `{}`: {e}", folder.display()))?;
            write_pages(&command, folder)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn write_pages(command: &Command, folder: &Path) -> Result<(), Failure> {
    let (name, text) = page(command)?;
    let path = folder.join(name);
    std::fs::write(&path, text).map_err(|e| format!("cannot write `{}`: {e}", path.display()))?;
    let mut own = command.get_subcommands().filter(|command| command.get_name() != "help");
    own.try_for_each(|command| write_pages(command, folder))
}

/// Its file's name and text.
fn page(command: &Command) -> Result<(String, String), Failure> {
    let man = clap_mangen::Man::new(command.clone());
    let mut text = Vec::new();
    man.render(&mut text)?;
    Ok((man.get_filename(), String::from_utf8(text)?))
}
