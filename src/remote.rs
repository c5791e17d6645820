//! Verification through another server: a gate that holds no seeds but its own.
//!
//! The server is another otpgate, or ungleich-otp: it is asked about each claim with the gate's own triple, of
//! the realm that may verify. Only that it says yes is remembered, until the time step ends ([`memory`]).
//! Whatever else happens is told apart: the server says no, or nobody can say ([`Trouble`]) and the gate fails
//! closed.
//!
//! On the wire, "your token is wrong" and "your realm may not verify" are one answer. So the gate asks about
//! itself, at its start and from time to time: with a right triple of the right realm the answer is yes. A no
//! to a claim is believed only after that.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::StatusCode;
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::{Instant as Deadline, timeout_at};
use tracing::{info, warn};

use crate::audit::Event;
use crate::client::{Client, ClientError, TokenSource, Verified};
use crate::clock::{Clock, Moment};
use crate::config::RemoteConfig;
use crate::directory::TokenRules;
use crate::entry::{Principal, PrincipalRef};
use crate::metrics::Metrics;
use crate::otp::{Reuse, Token};

mod memory;

use memory::{Found, Memory};

/// Between two questions about ourselves that the server did not answer.
const RETRY: Duration = Duration::from_millis(500);
/// How many times within `max_stale` we ask about ourselves.
const CHECKS: u32 = 3;

/// A claim to be checked.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// Who is claimed to be asking.
    pub who: PrincipalRef<'a>,
    /// What proves it.
    pub token: &'a Token,
    /// Where it comes from, for the server's own throttling.
    pub source: Option<IpAddr>,
    /// How often a token may be used here; `None`: as its realm says.
    pub reuse: Option<Reuse>,
}

/// Why nobody can say whether a claim is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The server took too long.
    Timeout,
    /// Too many questions were open.
    Busy,
    /// No connection.
    Unreachable,
    /// The server does not accept the gate's own triple, or its realm may not verify.
    Refused,
    /// The server makes the gate wait, after too many wrong tokens.
    Throttled,
    /// The server's answer is an error, or makes no sense.
    Failed,
    /// The server said no before it was known whether it accepts the gate itself.
    Unchecked,
}

impl Trouble {
    /// A bounded word for logs and metric labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Busy => "busy",
            Self::Unreachable => "unreachable",
            Self::Refused => "refused",
            Self::Throttled => "throttled",
            Self::Failed => "failed",
            Self::Unchecked => "unchecked",
        }
    }
}

/// What the server is asked about.
#[derive(Clone, Copy)]
enum About {
    Claim,
    /// Ourselves.
    Gate,
}

impl About {
    /// A metric's label.
    fn as_str(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Gate => "self",
        }
    }
}

/// What the server thinks of us.
#[derive(Debug)]
struct Standing {
    verdict: Verdict,
    /// When it last accepted us.
    accepted_at: Option<Instant>,
    /// What is wrong, for people; never a secret.
    trouble: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It has not said, or not lately.
    Unknown,
    /// We may verify.
    Accepted,
    /// We may not.
    Refused,
}

/// Asks the server; see the module.
pub struct Remote {
    client: Client,
    own: TokenSource,
    principal: Principal,
    rules: TokenRules,
    timeout: Duration,
    max_stale: Duration,
    questions: Semaphore,
    /// `None`: nothing is remembered.
    memory: Option<Memory>,
    standing: Mutex<Standing>,
    /// Somebody learnt that we may not be accepted any more.
    doubt: Notify,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
}

impl Remote {
    /// Connects to nothing yet. Tokens of the gate are made as `rules` say for its own realm.
    ///
    /// # Errors
    /// If certificates cannot be used.
    pub fn new(
        config: &RemoteConfig,
        rules: &TokenRules,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, ClientError> {
        let RemoteConfig { name, realm, seed, .. } = config.clone();
        let own = TokenSource::new(name, realm, seed)
            .with_params(rules.of(config.realm.as_str()).params)
            .with_clock(clock.clone());
        Ok(Self {
            // Time for another address where one is dead, and for the answer.
            client: Client::connecting_within(
                config.timeout * 3 / 4,
                &config.url,
                own.clone(),
                &config.tls,
            )?,
            own,
            principal: Principal { name: config.name.clone(), realm: config.realm.clone() },
            rules: rules.clone(),
            timeout: config.timeout,
            max_stale: config.max_stale,
            questions: Semaphore::new(config.max_in_flight),
            memory: Memory::new(config.cache_entries),
            standing: Mutex::new(Standing {
                verdict: Verdict::Unknown,
                accepted_at: None,
                trouble: None,
            }),
            doubt: Notify::new(),
            metrics,
            clock,
        })
    }

    /// Whether certificates and keys can be used.
    ///
    /// # Errors
    /// If they cannot.
    pub fn check(config: &RemoteConfig) -> Result<(), ClientError> {
        let RemoteConfig { name, realm, seed, url, tls, .. } = config.clone();
        Client::new(&url, TokenSource::new(name, realm, seed), &tls).map(drop)
    }

    /// Whether a claim is true.
    ///
    /// # Errors
    /// If nobody can say, within `remote.timeout`.
    pub async fn ask(&self, question: Question<'_>, now: Moment) -> Result<bool, Trouble> {
        let deadline = Deadline::now() + self.timeout;
        let rules = self.rules.of(question.who.realm());
        let step = memory::Step::of(now, rules.params.step_seconds);
        let mut place = None;
        if let (Reuse::Window, Some(memory)) = (question.reuse.unwrap_or(rules.reuse), &self.memory)
        {
            let print = memory.print(question.who, question.token, step);
            // Others may be asking the same: one question for all, unless the answer is no.
            let found = timeout_at(deadline, memory.find(&print, now)).await;
            match found.map_err(|_| Trouble::Timeout)? {
                Found::Remembered => {
                    self.metrics.remote_remembered.inc();
                    return Ok(true);
                }
                Found::Outdated => {}
                Found::Nothing(free) => place = Some(free),
            }
        }
        let answer = self.question(question, deadline).await?;
        match (place, answer) {
            (Some(place), Some(Verified { is_counted: false })) => place.remember(step),
            // Each use of a counted token is for the server to see.
            (Some(place), Some(Verified { is_counted: true })) => place.leave_to_each(now),
            _ => {}
        }
        Ok(answer.is_some())
    }

    /// `None`: the server says no.
    async fn question(
        &self,
        question: Question<'_>,
        deadline: Deadline,
    ) -> Result<Option<Verified>, Trouble> {
        if self.standing().verdict == Verdict::Refused {
            return Err(Trouble::Refused);
        }
        match self.put(About::Claim, question, deadline).await {
            Ok(verified) => {
                // As good as a question about ourselves.
                self.accepted();
                Ok(Some(verified))
            }
            Err(Failed { denied: true, .. }) if self.standing().verdict == Verdict::Accepted => {
                Ok(None)
            }
            Err(Failed { denied, trouble, .. }) => {
                if denied || trouble == Trouble::Refused {
                    self.doubt.notify_one();
                }
                Err(if denied { Trouble::Unchecked } else { trouble })
            }
        }
    }

    /// Asks the server.
    async fn put(
        &self,
        about: About,
        question: Question<'_>,
        deadline: Deadline,
    ) -> Result<Verified, Failed> {
        let Question { who, token, source, .. } = question;
        let begin = self.clock.monotonic();
        // Whoever waits longer for a turn would have no time for an answer.
        let outcome = match timeout_at(deadline - self.timeout / 2, self.turn(about)).await {
            Err(_) => Err(Failed::new(Trouble::Busy, "too many questions are open")),
            Ok(_turn) => {
                let asking = self.client.verify(who.name(), who.realm(), token.expose(), source);
                match timeout_at(deadline, asking).await {
                    Ok(answer) => answer.map_err(|error| Failed::from(&error)),
                    Err(_) => Err(Failed::new(Trouble::Timeout, "it does not answer in time")),
                }
            }
        };
        let word = match &outcome {
            Ok(_) => "ok",
            Err(Failed { denied: true, .. }) => "denied",
            Err(failed) => failed.trouble.as_str(),
        };
        let took = self.clock.monotonic().saturating_duration_since(begin);
        self.metrics.remote_question(about.as_str(), word, took);
        outcome
    }

    /// Waits until a question may be open. One about ourselves waits for no claims: however many of them are
    /// wrong, the gate knows whether it may verify.
    async fn turn(&self, about: About) -> Option<SemaphorePermit<'_>> {
        match about {
            // The semaphore is never closed.
            About::Claim => self.questions.acquire().await.ok(),
            About::Gate => None,
        }
    }

    /// Asks about ourselves, at the start and whenever that is in doubt. Never ends.
    pub async fn run(&self) {
        let every = self.max_stale / CHECKS;
        let mut told = None;
        loop {
            let since = self.accepted_for(self.clock.now());
            if let Some(age) = since.filter(|age| *age < every) {
                // Claims were confirmed meanwhile.
                tokio::select! {
                    () = tokio::time::sleep(every - age) => continue,
                    () = self.doubt.notified() => {}
                }
            }
            let pause = self.introduce().await;
            let verdict = self.standing().verdict;
            if told.replace(verdict) != Some(verdict) {
                self.tell(verdict);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Asks about ourselves; how long to wait before the next time.
    async fn introduce(&self) -> Duration {
        let who = PrincipalRef::from(&self.principal);
        let token = Token::parse(&self.own.token()).expect("tokens are made of digits");
        let question = Question { who, token: &token, source: None, reuse: None };
        let deadline = Deadline::now() + self.timeout;
        let Err(failed) = self.put(About::Gate, question, deadline).await else {
            self.accepted();
            return Duration::ZERO;
        };
        let (verdict, trouble) = match (failed.denied, failed.trouble) {
            // It knows us, or it would have said that it does not.
            (true, _) => (
                Verdict::Refused,
                "it does not let `remote.realm` verify, or takes its tokens once only".to_owned(),
            ),
            (false, Trouble::Refused) => (
                Verdict::Refused,
                "`remote.name`, `remote.realm` or `remote.seed` is not what it has, or a clock is wrong"
                    .to_owned(),
            ),
            (false, _) => (Verdict::Unknown, failed.words),
        };
        let mut standing = self.standing();
        standing.verdict = verdict;
        standing.trouble = Some(trouble);
        match failed.trouble {
            // Each of these counts as a wrong token there.
            Trouble::Refused | Trouble::Throttled => self.max_stale,
            _ => RETRY,
        }
    }

    fn tell(&self, verdict: Verdict) {
        let trouble = self.standing().trouble.clone().unwrap_or_default();
        let outcome = match verdict {
            Verdict::Accepted => {
                info!("the remote server lets this gate verify");
                "accepted"
            }
            Verdict::Unknown => {
                warn!(%trouble, "the remote server cannot be asked");
                "unreachable"
            }
            Verdict::Refused => {
                warn!(%trouble, "the remote server refuses this gate: everybody gets 503");
                "refused"
            }
        };
        Event { action: "remote", outcome, ..Event::default() }.log();
    }

    fn accepted(&self) {
        let now = self.clock.monotonic();
        let mut standing = self.standing();
        standing.accepted_at = Some(now);
        standing.verdict = Verdict::Accepted;
        standing.trouble = None;
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long ago the server last accepted the gate; `None`: never.
    #[must_use]
    pub fn accepted_for(&self, now: Moment) -> Option<Duration> {
        let at = self.standing().accepted_at;
        at.map(|at| now.monotonic.saturating_duration_since(at))
    }

    /// Why claims cannot be checked now, for people, if they cannot.
    #[must_use]
    pub fn trouble(&self, now: Moment) -> Option<String> {
        let age = self.accepted_for(now);
        let standing = self.standing();
        let is_recent = age.is_some_and(|age| age <= self.max_stale);
        if is_recent && standing.verdict != Verdict::Refused {
            return None;
        }
        let cause = standing.trouble.as_deref().unwrap_or("it has not answered yet");
        Some(match (standing.verdict, age) {
            (Verdict::Refused, _) => format!("the remote server refuses this gate: {cause}"),
            (_, Some(age)) => {
                format!("the remote server was last heard {} seconds ago: {cause}", age.as_secs())
            }
            (_, None) => format!("the remote server has not accepted this gate yet: {cause}"),
        })
    }
}

/// A question without a yes.
struct Failed {
    /// The server denies the claim, or the gate's right to ask.
    denied: bool,
    trouble: Trouble,
    /// For people.
    words: String,
}

impl Failed {
    fn new(trouble: Trouble, words: impl Into<String>) -> Self {
        Self { denied: false, trouble, words: words.into() }
    }
}

impl From<&ClientError> for Failed {
    fn from(error: &ClientError) -> Self {
        let trouble = match error {
            _ if error.is_denial() || error.is_about_caller() => Trouble::Refused,
            ClientError::Refused { status: StatusCode::TOO_MANY_REQUESTS, .. } => {
                Trouble::Throttled
            }
            ClientError::Unreachable(_) => Trouble::Unreachable,
            ClientError::Refused { .. } | ClientError::BadAnswer(_) | ClientError::Setup(_) => {
                Trouble::Failed
            }
        };
        Self { denied: error.is_denial(), trouble, words: error.to_string() }
    }
}
