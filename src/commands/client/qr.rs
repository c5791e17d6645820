//! What an authenticator app takes over, made here of what the server shows: it works with every server, also
//! for the one answer of those that hide seeds.

use std::io::IsTerminal as _;
use std::path::Path;

use clap::ValueEnum as _;
use serde_json::Value;
use zeroize::Zeroizing;

use super::CommandError;
use crate::client::{ClientError, ShownEntry};
use crate::commands::look::has_colours;
use crate::enrolment::{self, Code};
use crate::entry::{Algorithm, DIGITS, PERIOD_SECONDS, Seed};
use crate::otp::TokenParams;
use crate::store::private_file;

/// Refuses to draw a code, if it is wanted, where it would end in a log.
pub(super) fn check_terminal(wanted: bool) -> Result<(), CommandError> {
    if !wanted || std::io::stdout().is_terminal() {
        return Ok(());
    }
    let text = "standard output is no terminal, and the code holds the seed: `otpgate client qr --svg FILE` \
                writes it into a file that only you can read";
    Err(CommandError::Usage(text.into()))
}

/// The URI of an entry.
pub(super) fn uri(entry: &ShownEntry) -> Result<Zeroizing<String>, CommandError> {
    let Some(seed) = &entry.seed else {
        let text = "the server shows no seed (its `api.reveal_seeds` is off): `otpgate client rotate --qr` \
                    makes a new one";
        return Err(CommandError::Output(text.into()));
    };
    let seed = Seed::parse(seed.expose()).map_err(|e| bad(&format!("the seed {e}")))?;
    Ok(enrolment::uri(&entry.name, &entry.realm, &seed, params(entry)?))
}

/// The QR code of an entry.
pub(super) fn code(entry: &ShownEntry) -> Result<Code, CommandError> {
    Code::new(&uri(entry)?).map_err(|e| CommandError::Output(format!("{e}: take `client uri`")))
}

/// The code to print below an entry, if it is wanted. What keeps it from being drawn is said in its place: the
/// entry was made, and its seed is shown this once.
pub(super) fn below(entry: &ShownEntry, wanted: bool) -> String {
    if !wanted {
        return String::new();
    }
    code(entry)
        .map_or_else(|e| format!("no QR code: {e}"), |code| code.blocks(has_colours()).to_string())
}

/// Writes the code into a new file that only its owner may read.
pub(super) fn write(code: &Code, path: &Path) -> Result<(), CommandError> {
    let failed =
        |why: &str| CommandError::Output(format!("cannot write `{}`: {why}", path.display()));
    match private_file::create(path, code.svg().as_bytes()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(failed("it is there already")),
        Err(error) => Err(failed(&error.to_string())),
    }
}

/// How tokens are made; ungleich-otp says nothing, as it knows but one way.
fn params(entry: &ShownEntry) -> Result<TokenParams, CommandError> {
    let mut params = TokenParams::default();
    if let Some(given) = entry.more.get("algorithm").and_then(Value::as_str) {
        params.algorithm =
            Algorithm::from_str(given, true).map_err(|_| bad("an unknown algorithm"))?;
    }
    if let Some(given) = entry.more.get("digits").and_then(Value::as_u64) {
        let digits = u8::try_from(given).ok().filter(|digits| DIGITS.contains(digits));
        params.digits = digits.ok_or_else(|| bad("an unusable number of digits"))?;
    }
    if let Some(given) = entry.more.get("period").and_then(Value::as_u64) {
        let period = u32::try_from(given).ok().filter(|seconds| PERIOD_SECONDS.contains(seconds));
        params.step_seconds = period.ok_or_else(|| bad("an unusable period"))?;
    }
    Ok(params)
}

fn bad(what: &str) -> CommandError {
    ClientError::BadAnswer(what.to_owned()).into()
}
