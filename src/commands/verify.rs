//! `otpgate store verify`: whether the store agrees with itself, and gates with the store.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use serde_json::{Value, json};

use super::look::Look;
use super::progress::Progress;
use crate::cli::{Failure, Settings, Usage};
use crate::client::printable;
use crate::clock::{Clock as _, SystemClock};
use crate::store::digest::Digest;
use crate::store::verify::Verified;
use crate::store::{Scope, Store};

/// How long everything is looked at again and again, where writes go on.
const RESTLESS: Duration = Duration::from_secs(10);
/// How long a gate may take to be where the store is.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a gate is asked that is where the store is, but differs.
const LOOKS: u32 = 3;
/// Between two questions to a gate that is not there yet.
const PAUSE: Duration = Duration::from_millis(20);
/// Longest wait for an answer of a gate; it may have to sum up many entries.
const ANSWER: Duration = Duration::from_secs(30);
/// Largest answer of a gate.
const MAX_ANSWER: usize = 1 << 20;

/// Arguments of `otpgate store verify`.
///
/// Writes may go on meanwhile. Where they never pause, gates cannot be compared; that is told, and is no
/// success.
#[derive(Clone, Debug, Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    settings: Settings,
    /// Ops address of a gate whose entries are compared with the store: http://HOST:PORT, https://HOST:PORT or
    /// unix:/PATH; can be given several times
    #[arg(long, value_name = "URL")]
    gate: Vec<String>,
    /// For machines: {"ok", "version", "entries", "problems", "problem_count", "left_out", "gates"}
    #[arg(long)]
    json: bool,
}

/// A gate's answer to `GET /directory`.
#[derive(Clone, Debug, Deserialize)]
struct Held {
    version: u64,
    nonce: String,
    entries: u64,
    names: String,
    /// `None` where it holds names only.
    contents: Option<String>,
    /// `None` where it holds all.
    realms: Option<BTreeSet<String>>,
    current: bool,
}

/// One gate to compare.
struct Gate {
    address: String,
    url: Url,
    http: reqwest::Client,
}

/// How a gate compares with the store.
enum Verdict {
    /// It holds what the store holds; how many entries that are.
    Equal(u64),
    /// What differs, as sentences.
    Different(Vec<String>),
    /// The store changed meanwhile.
    Moved,
}

/// Looks at the store, and then at each gate; again while the store changes.
///
/// # Errors
/// If the store cannot be read; what is wrong with its contents is no error but the result.
pub async fn run(args: VerifyArgs) -> Result<ExitCode, Failure> {
    let gates: Vec<_> = args.gate.iter().map(|url| Gate::new(url)).collect::<Result<_, _>>()?;
    let config = args.settings.load_store()?;
    let store = Store::open_as_it_is(&config.store)?;
    let start = SystemClock.monotonic();
    let (verified, verdicts) = loop {
        let (verified, verdicts) = compare(&store, &gates).await?;
        let moved = verdicts.iter().any(|verdict| matches!(verdict, Verdict::Moved));
        if !moved || start.elapsed() > RESTLESS {
            break (verified, verdicts);
        }
    };
    let sound = verified.problems.count == 0;
    let equal = verdicts.iter().all(|verdict| matches!(verdict, Verdict::Equal(_)));
    super::print(&if args.json {
        json_of(&verified, &gates, &verdicts, sound && equal)
    } else {
        text_of(&verified, &gates, &verdicts, Look::of_stdout())
    })?;
    Ok(if sound && equal { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One look at the store and all gates.
async fn compare(store: &Store, gates: &[Gate]) -> Result<(Verified, Vec<Verdict>), Failure> {
    let mut scopes: Vec<Result<Scope, String>> = Vec::new();
    for gate in gates {
        scopes.push(
            gate.ask().await.map(|held| held.realms.map_or_else(Scope::default, Scope::only)),
        );
    }
    let known: Vec<Scope> = scopes.iter().map(|s| s.clone().unwrap_or_default()).collect();
    let mut progress = Progress::of_store("verifying", store).await;
    let verified = store.verify(&known, |seen| progress.reach(seen)).await?;
    drop(progress);
    let mut verdicts = Vec::new();
    for ((gate, scope), sum) in gates.iter().zip(scopes).zip(&verified.sums) {
        verdicts.push(match scope {
            Err(why) => Verdict::Different(vec![why]),
            Ok(_) if !verified.still => Verdict::Moved,
            Ok(scope) => gate.judge(&verified, &scope, sum).await,
        });
    }
    Ok((verified, verdicts))
}

impl Gate {
    fn new(address: &str) -> Result<Self, Failure> {
        let bad = || {
            Usage(format!(
                "--gate `{address}` is none of http://HOST:PORT, https://HOST:PORT, unix:/PATH"
            ))
        };
        let socket = address.strip_prefix("unix:");
        let url = Url::parse(socket.map_or(address, |_| "http://localhost")).map_err(|_| bad())?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(bad().into());
        }
        let url = url.join("/directory").map_err(|_| bad())?;
        // Whoever comes first installs it; both are the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .timeout(ANSWER)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        if let Some(path) = socket {
            builder = builder.unix_socket(Path::new(path));
        }
        if url.scheme() == "http" {
            // Plain connections must work where the system has no certificates.
            builder = builder.tls_certs_only([]);
        }
        Ok(Self { address: address.to_owned(), url, http: builder.build()? })
    }

    async fn ask(&self) -> Result<Held, String> {
        let unreachable = |e: reqwest::Error| format!("cannot be asked: {}", e.without_url());
        let start = SystemClock.monotonic();
        let mut answer = loop {
            let answer = self.http.get(self.url.clone()).send().await.map_err(unreachable)?;
            // It answers one question of this kind at a time.
            let busy = answer.status() == StatusCode::SERVICE_UNAVAILABLE;
            if !busy || start.elapsed() > PATIENCE {
                break answer;
            }
            tokio::time::sleep(PAUSE).await;
        };
        if !answer.status().is_success() {
            return Err(format!("answers {}: is that its ops address?", answer.status()));
        }
        let mut body = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(unreachable)? {
            body.extend_from_slice(&part);
            if body.len() > MAX_ANSWER {
                return Err("its answer is too large".to_owned());
            }
        }
        serde_json::from_slice(&body).map_err(|_| "its answer is not that of a gate".to_owned())
    }

    /// Waits until the gate is where the store was; compares then.
    async fn judge(&self, verified: &Verified, scope: &Scope, sum: &Digest) -> Verdict {
        let start = SystemClock.monotonic();
        let at = &verified.position;
        let mut looks = 0;
        loop {
            let held = match self.ask().await {
                Ok(held) => held,
                Err(why) => return Verdict::Different(vec![why]),
            };
            if held.version > at.version.0 || held.realms.as_ref() != scope.realms() {
                return Verdict::Moved;
            }
            let there = held.version == at.version.0 && held.nonce == at.nonce.0;
            if there && held.current {
                looks += 1;
                let verdict = compare_sums(&held, sum);
                // It may have been summing up while it applied what the store did since.
                if looks == LOOKS || matches!(verdict, Verdict::Equal(_)) {
                    return verdict;
                }
            } else if start.elapsed() > PATIENCE {
                let (own, stores) = (held.version, at.version);
                return Verdict::Different(vec![if there {
                    "its entries are not known to be current".to_owned()
                } else if own == stores.0 {
                    format!("follows another change log that is at version {own} too")
                } else {
                    format!("is at version {own}, the store at {stores}")
                }]);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

fn compare_sums(held: &Held, sum: &Digest) -> Verdict {
    let mut differences = Vec::new();
    if held.entries != sum.entries {
        differences.push(format!("holds {} entries, the store {}", held.entries, sum.entries));
    }
    if held.names != hex(sum.names) {
        differences.push("holds other names than the store".to_owned());
    }
    if held.contents.as_ref().is_some_and(|contents| *contents != hex(sum.contents)) {
        differences.push("holds other contents than the store".to_owned());
    }
    if differences.is_empty() {
        Verdict::Equal(sum.entries)
    } else {
        Verdict::Different(differences)
    }
}

/// As gates write sums.
fn hex(sum: u64) -> String {
    format!("{sum:016x}")
}

impl Verdict {
    fn differences(&self) -> Vec<String> {
        match self {
            Self::Equal(_) => Vec::new(),
            Self::Different(what) => what.clone(),
            Self::Moved => vec!["cannot be compared: the store does not stop changing".to_owned()],
        }
    }
}

fn json_of(verified: &Verified, gates: &[Gate], verdicts: &[Verdict], ok: bool) -> String {
    let gates: Vec<Value> = gates
        .iter()
        .zip(verdicts)
        .map(|(gate, verdict)| {
            let differences = verdict.differences();
            json!({ "gate": gate.address, "equal": differences.is_empty(), "differences": differences })
        })
        .collect();
    let Verified { position, entries, problems, left_out, .. } = verified;
    json!({
        "ok": ok, "version": position.version.0, "entries": entries, "problems": problems.named,
        "problem_count": problems.count, "left_out": left_out, "gates": gates,
    })
    .to_string()
}

fn text_of(verified: &Verified, gates: &[Gate], verdicts: &[Verdict], look: Look) -> String {
    let Look { good, bad, .. } = look;
    let Verified { position, entries, problems, left_out, .. } = verified;
    let count = problems.count;
    let found = if count == 0 { good } else { bad };
    let mut text = format!(
        "{entries} entries at version {}, {found}{count} problems{found:#}",
        position.version
    );
    for problem in &problems.named {
        text.push_str(&format!("\n  {}", printable(problem)));
    }
    let more = count - problems.named.len() as u64;
    if more > 0 {
        text.push_str(&format!("\n  and {more} more"));
    }
    for what in left_out {
        text.push_str(&format!("\nnot looked at: {what}"));
    }
    for (gate, verdict) in gates.iter().zip(verdicts) {
        text.push_str(&match verdict {
            Verdict::Equal(held) => {
                format!("\n{}: {good}equal{good:#}, {held} entries", gate.address)
            }
            other => {
                let differences = printable(&other.differences().join("; "));
                format!("\n{}: {bad}{differences}{bad:#}", gate.address)
            }
        });
    }
    text
}
