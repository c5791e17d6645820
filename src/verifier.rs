//! The decision whether a claim is proven, by entries in memory or by a remote server. No clock: time is
//! passed in.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tracing::error;

use crate::checker::Checker;
use crate::clock::Moment;
use crate::directory::{self, Credential, Directory, RealmRules, TokenRules};
use crate::entry::{EntryId, Principal, PrincipalRef, Seed};
use crate::metrics::Metrics;
use crate::otp::{MatchedStep, Reuse, Token};
use crate::remote::{Question, Remote, Trouble};
use crate::store::{Spending, Store};
use crate::throttle::{Source, Throttle, Throttled};

/// How far apart the clocks of gates, and of the store, may be before a used token is accepted again.
const CLOCKS_APART: Duration = Duration::from_secs(120);

/// Proof that a principal made a valid token just now. Only [`Verifier::verify`] makes one; what
/// forwards a request takes it, so forgetting the check does not compile.
#[derive(Debug)]
pub struct Permit {
    principal: Principal,
    proof: Proof,
}

impl Permit {
    /// Who proved itself.
    #[must_use]
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// As [`Self::principal`].
    #[must_use]
    pub fn into_principal(self) -> Principal {
        self.principal
    }

    /// The number of its entry; `None`: a remote server has it.
    #[must_use]
    pub fn id(&self) -> Option<EntryId> {
        self.proof.of_entry().map(|proof| proof.id)
    }

    /// Which time step the token belonged to; `None`: a remote server knows.
    #[must_use]
    pub fn step(&self) -> Option<MatchedStep> {
        self.proof.of_entry().map(|proof| proof.step)
    }

    /// Whether this was one of a limited number of uses of the token, as its realm says; only known of
    /// entries in memory.
    #[must_use]
    pub fn is_counted(&self) -> bool {
        self.proof.of_entry().is_some_and(|proof| proof.reuse != Reuse::Window)
    }

    /// Whether the token was made with a seed that is being rotated out, as far as is known here.
    #[must_use]
    pub fn is_of_previous_seed(&self) -> bool {
        self.proof.of_entry().is_some_and(|proof| proof.previous)
    }
}

/// What showed that a claim is true.
#[derive(Clone, Copy, Debug)]
enum Proof {
    /// An entry.
    Entry(EntryProof),
    /// The word of a remote server.
    Remote,
}

impl Proof {
    fn of_entry(&self) -> Option<&EntryProof> {
        match self {
            Self::Entry(proof) => Some(proof),
            Self::Remote => None,
        }
    }
}

/// What a right token showed.
#[derive(Clone, Copy, Debug)]
struct EntryProof {
    id: EntryId,
    step: MatchedStep,
    /// Which of the entry's seeds made it.
    serial: u32,
    previous: bool,
    /// What the entry's realm says.
    reuse: Reuse,
    /// Longer than the token is accepted, also by gates whose clocks are apart.
    window: Duration,
}

/// Why a claim is not proven. Callers are never told which: it is for logs and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// No such entry.
    UnknownPrincipal,
    /// The token belongs to no accepted time step, or has the wrong form.
    WrongToken,
    /// The entry is disabled.
    Disabled,
    /// The entry has expired.
    Expired,
    /// Other requests have used the token as often as it may be.
    Reused,
    /// A remote server says so, and not why.
    Remotely,
}

/// Why nobody can say whether a claim is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// The directory has no answer.
    Directory(directory::Unavailable),
    /// The remote server has none.
    Remote(Trouble),
}

/// Why there is no permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The claim is not proven.
    Denied(Denied),
    /// Too many tokens were wrong: this one was not looked at.
    Throttled(Throttled),
    /// Nobody can say: fail closed, with 503.
    Unavailable(Unavailable),
    /// The token is right, but its use cannot be recorded: fail closed, with 503.
    NoMarks,
}

impl Refusal {
    /// A bounded word for logs and metric labels.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Denied(Denied::UnknownPrincipal) => "unknown_principal",
            Self::Denied(Denied::WrongToken) => "wrong_token",
            Self::Denied(Denied::Disabled) => "disabled",
            Self::Denied(Denied::Expired) => "expired",
            Self::Denied(Denied::Reused) => "reused",
            Self::Throttled(_) => "throttled",
            Self::Denied(Denied::Remotely) => "remote_denied",
            Self::Unavailable(Unavailable::Directory(cause)) => match cause {
                directory::Unavailable::Stale => "stale",
                directory::Unavailable::Broken => "broken_entry",
                directory::Unavailable::NotHeld => "not_fetched",
            },
            Self::Unavailable(Unavailable::Remote(trouble)) => match trouble {
                Trouble::Timeout => "remote_timeout",
                Trouble::Busy => "remote_busy",
                Trouble::Unreachable => "remote_unreachable",
                Trouble::Refused => "remote_refused",
                Trouble::Throttled => "remote_throttled",
                Trouble::Failed => "remote_failed",
                Trouble::Unchecked => "remote_unchecked",
            },
            Self::NoMarks => "no_marks",
        }
    }
}

/// A claim, and what is known of the request that makes it.
#[derive(Clone, Copy, Debug)]
pub struct Attempt<'a> {
    /// Who is claimed to be asking.
    pub who: PrincipalRef<'a>,
    /// `None`: one of wrong form. It is denied after the same work.
    pub token: Option<&'a Token>,
    /// Where it comes from.
    pub source: Source,
    /// Names the request: asking again from the same source under the same name is not another use
    /// of the token. So it must be one that callers cannot choose.
    pub request: &'a str,
    /// How often a token may be used here; `None`: as its realm says.
    pub reuse: Option<Reuse>,
}

/// How long a used token must be remembered: as long as any gate accepts it.
fn mark_time(step_seconds: u64, skew: u8) -> Duration {
    Duration::from_secs(step_seconds * (2 * u64::from(skew) + 1)) + CLOCKS_APART
}

/// Checks claims.
pub struct Verifier {
    basis: Basis,
    throttle: Arc<Throttle>,
    metrics: Arc<Metrics>,
}

/// What claims are checked against.
pub enum Basis {
    /// Entries that this process follows.
    Entries(Box<Entries>),
    /// Another server.
    Remote(Arc<Remote>),
}

/// Entries that this process follows, and the store that they are from, where uses of tokens are recorded.
pub struct Entries {
    /// What is in memory of them.
    pub directory: Arc<Directory>,
    /// Where they are kept.
    pub store: Store,
    rules: ArcSwap<Rules>,
}

impl Entries {
    /// The entries of `directory`, which follows `store`.
    #[must_use]
    pub fn new(directory: Arc<Directory>, store: Store) -> Self {
        let rules = ArcSwap::from_pointee(Rules::new(directory.rules()));
        Self { directory, store, rules }
    }

    /// Changes the rules that tokens are checked under, here and in the directory.
    pub fn set_rules(&self, rules: TokenRules) {
        self.directory.set_rules(rules);
        self.rules.store(Arc::new(Rules::new(self.directory.rules())));
    }
}

/// What is the same for all entries of a realm; replaced as a whole.
struct Rules {
    of: Arc<TokenRules>,
    nobody: Nobody,
}

impl Rules {
    fn new(of: Arc<TokenRules>) -> Self {
        Self { nobody: Nobody::new(&Seed::random(), &of), of }
    }
}

/// Checked in place of seeds that do not exist, under the rules of their realm, so that an unknown
/// name costs what a known one costs.
struct Nobody {
    /// In realms that are not listed.
    default: Checker,
    /// In listed realms, by name.
    realms: HashMap<String, Checker>,
}

impl Nobody {
    fn new(seed: &Seed, rules: &TokenRules) -> Self {
        let of = |rules: &RealmRules| Checker::new(seed, rules.params);
        let realms = rules.realms.iter().map(|(name, rules)| (name.clone(), of(rules))).collect();
        Self { default: of(&rules.default), realms }
    }

    fn of(&self, realm: &str) -> &Checker {
        self.realms.get(realm).unwrap_or(&self.default)
    }
}

impl Verifier {
    /// A verifier on `basis`.
    #[must_use]
    pub fn new(basis: Basis, throttle: Arc<Throttle>, metrics: Arc<Metrics>) -> Self {
        Self { basis, throttle, metrics }
    }

    /// What claims are checked against.
    #[must_use]
    pub fn basis(&self) -> &Basis {
        &self.basis
    }

    /// The entries that claims are checked against; `None`: a remote server has them.
    #[must_use]
    pub fn entries(&self) -> Option<&Entries> {
        match &self.basis {
            Basis::Entries(entries) => Some(entries),
            Basis::Remote(_) => None,
        }
    }

    /// Whether claims can be checked.
    #[must_use]
    pub fn is_current(&self, now: Moment) -> bool {
        match &self.basis {
            Basis::Entries(entries) => entries.directory.is_current(now),
            Basis::Remote(remote) => remote.trouble(now).is_none(),
        }
    }

    /// Checks that the token of `attempt` was made by whom it claims, at about `now`.
    ///
    /// # Errors
    /// If the claim is not proven or cannot be checked.
    pub async fn verify(&self, attempt: Attempt<'_>, now: Moment) -> Result<Permit, Refusal> {
        let realm = attempt.who.realm();
        match self.prove(attempt, now).await {
            Ok(proof) => {
                let permit = Permit { principal: attempt.who.to_owned(), proof };
                self.metrics.verified(realm, permit.step());
                if permit.is_of_previous_seed() {
                    self.metrics.previous_seed(realm);
                }
                Ok(permit)
            }
            Err(refusal) => {
                self.metrics.refused(realm, refusal.reason());
                Err(refusal)
            }
        }
    }

    async fn prove(&self, attempt: Attempt<'_>, now: Moment) -> Result<Proof, Refusal> {
        let Attempt { who, source, .. } = attempt;
        let admitted = self.throttle.check(who, source, now).await.map_err(Refusal::Throttled)?;
        let (id, checked) = match &self.basis {
            Basis::Entries(entries) => entries.look_up(attempt, now).await?,
            // Its future is large.
            Basis::Remote(remote) => (None, Box::pin(ask(remote, attempt, now)).await?),
        };
        match checked {
            Ok(proof) => {
                self.spend(attempt, &proof, now).await?;
                self.throttle.succeeded(admitted);
                Ok(proof)
            }
            Err(denied) => {
                self.throttle.failed(admitted, id);
                Err(Refusal::Denied(denied))
            }
        }
    }

    /// Records the use of a right token, where uses count here.
    async fn spend(&self, attempt: Attempt<'_>, proof: &Proof, now: Moment) -> Result<(), Refusal> {
        match (&self.basis, proof) {
            (Basis::Entries(entries), Proof::Entry(proof)) => {
                entries.spend(attempt, proof, now).await
            }
            _ => Ok(()),
        }
    }
}

/// Asks the remote server. A token of wrong form is none anywhere.
async fn ask(
    remote: &Remote,
    attempt: Attempt<'_>,
    now: Moment,
) -> Result<Result<Proof, Denied>, Refusal> {
    let Attempt { who, source, reuse, .. } = attempt;
    let Some(token) = attempt.token else { return Ok(Err(Denied::WrongToken)) };
    let question = Question { who, token, source: source.address(), reuse };
    match remote.ask(question, now).await {
        Ok(true) => Ok(Ok(Proof::Remote)),
        Ok(false) => Ok(Err(Denied::Remotely)),
        Err(trouble) => Err(Refusal::Unavailable(Unavailable::Remote(trouble))),
    }
}

impl Entries {
    /// The number of the claimed entry, if there is one, and what checking the claim shows.
    async fn look_up(
        &self,
        attempt: Attempt<'_>,
        now: Moment,
    ) -> Result<(Option<EntryId>, Result<Proof, Denied>), Refusal> {
        let (id, checked) = self
            .directory
            .look_up(attempt.who, now, |credential| {
                (credential.map(|c| c.id), self.check(attempt, credential, now))
            })
            .await
            .map_err(|cause| Refusal::Unavailable(Unavailable::Directory(cause)))?;
        Ok((id, checked.map(Proof::Entry)))
    }

    fn check(
        &self,
        attempt: Attempt<'_>,
        credential: Option<&Credential>,
        now: Moment,
    ) -> Result<EntryProof, Denied> {
        let Attempt { who, token, .. } = attempt;
        let malformed = Token::parse("000000").expect("six digits");
        let claimed = token.unwrap_or(&malformed);
        let rules = self.rules.load();
        let nobody = rules.nobody.of(who.realm());
        let RealmRules { skew_steps: skew, reuse, .. } = *rules.of.of(who.realm());
        let step_of = |checker: &Checker| {
            let recalled = checker.recall(claimed, now.unix, skew);
            recalled.or_else(|| checker.check(claimed, now.unix, skew))
        };
        let Some(credential) = credential else {
            black_box((step_of(nobody), step_of(nobody)));
            return Err(Denied::UnknownPrincipal);
        };
        let current = &credential.checker;
        let previous = credential.previous.as_ref().filter(|previous| previous.until > now.unix);
        let matched = match (step_of(current), previous) {
            (Some(step), _) => Some((current, step, credential.serial, false)),
            (None, Some(previous)) => step_of(&previous.checker)
                .map(|step| (&previous.checker, step, previous.serial, true)),
            (None, None) => {
                black_box(step_of(nobody));
                None
            }
        };
        match matched {
            _ if !credential.enabled => Err(Denied::Disabled),
            _ if credential.expires_at.is_some_and(|at| at <= now.unix) => Err(Denied::Expired),
            Some((checker, step, serial, previous)) if token.is_some() => {
                checker.remember(claimed, step);
                Ok(EntryProof {
                    id: credential.id,
                    step,
                    serial,
                    previous,
                    reuse,
                    window: mark_time(checker.step_seconds(), skew),
                })
            }
            _ => Err(Denied::WrongToken),
        }
    }

    /// Records the use of a right token, where uses count.
    async fn spend(
        &self,
        attempt: Attempt<'_>,
        proof: &EntryProof,
        now: Moment,
    ) -> Result<(), Refusal> {
        let Reuse::Times(budget) = attempt.reuse.unwrap_or(proof.reuse) else { return Ok(()) };
        let spending = Spending {
            id: proof.id,
            serial: proof.serial,
            counter: proof.step.counter,
            by: format!("{} {}", attempt.source, attempt.request),
            budget: budget.get(),
            keep: proof.window,
        };
        match self.store.spend(&spending, now.unix).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Refusal::Denied(Denied::Reused)),
            Err(error) => {
                error!(%error, request_id = attempt.request, "the use of a token cannot be recorded: refused");
                Err(Refusal::NoMarks)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::COMPUTED;
    use crate::clock::{Clock as _, SystemClock};
    use crate::directory::{Hold, PreviousSeed};
    use crate::entry::Algorithm;
    use crate::otp::TokenParams;
    use crate::seal::Sealer;
    use crate::store::sqlite::Sqlite;

    /// A time at which the token of [`seed`] is 000000.
    const ALL_ZEROS_AT: u64 = 1_810_804_020;

    /// The one that RFC 4226 uses.
    fn seed() -> Seed {
        Seed::parse("GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ").unwrap()
    }

    fn checker(seed: &Seed) -> Checker {
        Checker::new(seed, TokenParams::default())
    }

    fn credential() -> Credential {
        let (id, checker) = (EntryId(1), checker(&seed()));
        Credential { id, checker, serial: 1, previous: None, enabled: true, expires_at: None }
    }

    /// Checks claims about credentials; the store is never opened.
    fn entries() -> Entries {
        let store = Store::new(Arc::new(Sqlite::new("/nowhere".as_ref())), Sealer::off());
        let (metrics, now) = (Arc::new(Metrics::new([])), SystemClock.now());
        let (hold, rules) = (Hold::default(), TokenRules::default());
        let of = store.clone();
        let directory = Directory::new(of, &hold, rules, Duration::ZERO, metrics, now);
        Entries::new(Arc::new(directory), store)
    }

    fn check(
        entries: &Entries,
        credential: Option<&Credential>,
        token: Option<&Token>,
        unix: u64,
    ) -> Result<EntryProof, Denied> {
        let who = PrincipalRef::parse("alice", "staff").unwrap();
        let attempt = Attempt { who, token, source: Source::Local, request: "any", reuse: None };
        entries.check(attempt, credential, Moment { unix, ..SystemClock.now() })
    }

    /// Nobody learns from the time of an answer whether there is an entry, what it is like, or whether its
    /// token was used before.
    #[test]
    fn all_wrong_tokens_take_the_same_work() {
        let (entries, now) = (entries(), 1_800_000_000);
        let rotated = |until| {
            let checker = checker(&Seed::parse("MFRGGZDFMZTWQ2LKNNWG23TPOBYXE43U").unwrap());
            let previous = Some(Box::new(PreviousSeed { checker, serial: 0, until }));
            Credential { previous, ..credential() }
        };
        let (used, of_previous) = (credential(), rotated(now + 1));
        let previous = &of_previous.previous.as_ref().unwrap().checker;
        for (credential, right) in
            [(&used, used.checker.token_at(now)), (&of_previous, previous.token_at(now))]
        {
            check(&entries, Some(credential), Some(&right), now).unwrap();
        }
        let kinds = [
            None,
            Some(credential()),
            Some(used),
            Some(of_previous),
            Some(rotated(now + 1)),
            Some(rotated(now)),
            Some(Credential { enabled: false, ..credential() }),
            Some(Credential { expires_at: Some(now), ..credential() }),
        ];
        let wrong = Token::parse("000000").unwrap();
        for (i, kind) in kinds.iter().enumerate() {
            for token in [Some(&wrong), None] {
                let before = COMPUTED.get();
                assert!(check(&entries, kind.as_ref(), token, now).is_err(), "{i}");
                assert_eq!(COMPUTED.get() - before, 2 * 3, "{i}");
            }
        }
    }

    /// A token of wrong form is checked as another one, which may be right.
    #[test]
    fn what_is_no_token_proves_nobody() {
        let (entries, credential) = (entries(), credential());
        let zeros = credential.checker.token_at(ALL_ZEROS_AT);
        assert_eq!(zeros.expose(), "000000");
        // The second time, the right one is remembered.
        for _ in 0..2 {
            let checked = check(&entries, Some(&credential), None, ALL_ZEROS_AT);
            assert_eq!(checked.err(), Some(Denied::WrongToken));
            check(&entries, Some(&credential), Some(&zeros), ALL_ZEROS_AT).unwrap();
        }
    }

    /// Used first by a gate that is ahead as early as can be, accepted last by one that is behind.
    #[test]
    fn marks_outlast_tokens() {
        let seed = Seed::random();
        let half = CLOCKS_APART.as_secs() / 2;
        for (step_seconds, skew) in [(5, 0), (5, 1), (30, 1), (30, 10), (3600, 0), (3600, 10)] {
            let params = TokenParams { step_seconds, ..TokenParams::default() };
            let checker = Checker::new(&seed, params);
            let counter = 472_222 * 3600 / u64::from(step_seconds);
            let token = checker.token_at(counter * u64::from(step_seconds));
            let accepted =
                |at| checker.check(&token, at, skew).is_some_and(|step| step.counter == counter);
            let step = u64::from(step_seconds);
            let steps = || counter - 2 * u64::from(skew) - 2..counter + 2 * u64::from(skew) + 2;
            let first = steps().map(|n| n * step).find(|at| accepted(*at)).unwrap();
            let last = steps().rev().map(|n| n * step + step - 1).find(|at| accepted(*at)).unwrap();
            let span = (last + half) - (first - half);
            assert!(mark_time(step_seconds.into(), skew).as_secs() > span, "{step_seconds} {skew}");
        }
    }

    #[test]
    fn nobody_is_checked_as_somebody_of_that_realm() {
        let rules = |algorithm, digits, step_seconds| RealmRules {
            params: TokenParams { algorithm, digits, step_seconds },
            skew_steps: 1,
            reuse: Reuse::Window,
        };
        let rules = TokenRules {
            default: rules(Algorithm::Sha256, 7, 60),
            realms: HashMap::from([("strong".to_owned(), rules(Algorithm::Sha512, 8, 30))]),
        };
        let seed = Seed::random();
        let nobody = Nobody::new(&seed, &rules);
        for realm in ["strong", "any"] {
            let somebody = Checker::new(&seed, rules.of(realm).params);
            for at in [0, 59, 1_700_000_000] {
                let [of_nobody, expected] = [nobody.of(realm), &somebody].map(|c| c.token_at(at));
                assert_eq!(of_nobody.expose(), expected.expose(), "{realm}");
            }
        }
    }
}
