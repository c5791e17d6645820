//! The decision whether a claim is proven. No sockets, no clock: time is passed in.

use std::collections::HashMap;
use std::sync::Arc;

use crate::clock::Moment;
use crate::directory::{Credential, Directory, RealmRules, TokenRules, Unavailable};
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
    nobody: Nobody,
}

/// Checked in place of entries that do not exist, under the rules of their realm, so that an unknown
/// name costs what a known one costs.
struct Nobody {
    /// In realms that are not listed.
    default: Generator,
    /// In listed realms, by name.
    realms: HashMap<String, Generator>,
}

impl Nobody {
    fn new(seed: &Seed, rules: &TokenRules) -> Self {
        let of = |rules: &RealmRules| Generator::new(seed, rules.params);
        let realms = rules.realms.iter().map(|(name, rules)| (name.clone(), of(rules))).collect();
        Self { default: of(&rules.default), realms }
    }

    fn of(&self, realm: &str) -> &Generator {
        self.realms.get(realm).unwrap_or(&self.default)
    }
}

impl Verifier {
    /// A verifier on `directory`.
    #[must_use]
    pub fn new(directory: Arc<Directory>, metrics: Arc<Metrics>) -> Self {
        let nobody = Nobody::new(&Seed::random(), directory.rules());
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
            let _ = self.nobody.of(who.realm()).check(claimed, now.unix, skew);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Algorithm;
    use crate::otp::TokenParams;

    #[test]
    fn nobody_is_checked_as_somebody_of_that_realm() {
        let rules = |algorithm, digits, step_seconds| RealmRules {
            params: TokenParams { algorithm, digits, step_seconds },
            skew_steps: 1,
        };
        let rules = TokenRules {
            default: rules(Algorithm::Sha256, 7, 60),
            realms: HashMap::from([("strong".to_owned(), rules(Algorithm::Sha512, 8, 30))]),
        };
        let seed = Seed::random();
        let nobody = Nobody::new(&seed, &rules);
        for realm in ["strong", "any"] {
            let somebody = Generator::new(&seed, rules.of(realm).params);
            for at in [0, 59, 1_700_000_000] {
                assert_eq!(nobody.of(realm).token_at(at), somebody.token_at(at), "{realm}");
            }
        }
    }
}
