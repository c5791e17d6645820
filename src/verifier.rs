//! The decision whether a claim is proven. No sockets, no clock: time is passed in.

use std::sync::Arc;

use crate::clock::Moment;
use crate::directory::{Credential, Directory, Unavailable};
use crate::entry::{Principal, PrincipalRef, Seed};
use crate::metrics::Metrics;
use crate::otp::{Generator, MatchedStep, Token};

/// Proof that a principal made a valid token just now. Only [`Verifier::verify`] makes one; what
/// forwards a request takes it, so forgetting the check does not compile.
#[derive(Debug)]
pub struct Permit {
    principal: Principal,
    step: MatchedStep,
}

impl Permit {
    /// Who proved itself.
    #[must_use]
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// Which time step the token belonged to.
    #[must_use]
    pub fn step(&self) -> MatchedStep {
        self.step
    }
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
}

/// Why there is no permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The claim is not proven.
    Denied(Denied),
    /// Nobody can say: fail closed, with 503.
    Unavailable(Unavailable),
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
            Self::Unavailable(Unavailable::Stale) => "stale",
            Self::Unavailable(Unavailable::Broken) => "broken_entry",
        }
    }
}

/// Checks claims against the directory.
pub struct Verifier {
    directory: Arc<Directory>,
    metrics: Arc<Metrics>,
    /// Checked in place of entries that do not exist, so that an unknown name costs what a known
    /// one costs.
    nobody: Generator,
}

impl Verifier {
    /// A verifier on `directory`.
    #[must_use]
    pub fn new(directory: Arc<Directory>, metrics: Arc<Metrics>) -> Self {
        let nobody = Generator::new(&Seed::random(), directory.rules().default.params);
        Self { directory, metrics, nobody }
    }

    /// The directory that claims are checked against.
    #[must_use]
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Checks that `who` made `token` at about `now`. `None` as token is one of wrong form: it is
    /// denied after the same work.
    ///
    /// # Errors
    /// If the claim is not proven or cannot be checked.
    pub fn verify(
        &self,
        who: PrincipalRef<'_>,
        token: Option<&Token>,
        now: Moment,
    ) -> Result<Permit, Refusal> {
        let checked = self
            .directory
            .look_up(who, now, |credential| self.check(who, credential, token, now))
            .map_err(Refusal::Unavailable)
            .and_then(|checked| checked.map_err(Refusal::Denied));
        match &checked {
            Ok(step) => self.metrics.verified(who.realm(), *step),
            Err(refusal) => self.metrics.refused(who.realm(), refusal.reason()),
        }
        checked.map(|step| Permit { principal: who.to_owned(), step })
    }

    fn check(
        &self,
        who: PrincipalRef<'_>,
        credential: Option<&Credential>,
        token: Option<&Token>,
        now: Moment,
    ) -> Result<MatchedStep, Denied> {
        let malformed = Token::parse("000000").expect("six digits");
        let claimed = token.unwrap_or(&malformed);
        let Some(credential) = credential else {
            let skew = self.directory.rules().of(who.realm()).skew_steps;
            let _ = self.nobody.check(claimed, now.unix, skew);
            return Err(Denied::UnknownPrincipal);
        };
        let matched = credential.generator.check(claimed, now.unix, credential.skew_steps);
        match matched {
            _ if !credential.enabled => Err(Denied::Disabled),
            _ if credential.expires_at.is_some_and(|at| at <= now.unix) => Err(Denied::Expired),
            Some(step) if token.is_some() => Ok(step),
            _ => Err(Denied::WrongToken),
        }
    }
}
