//! Claims that the server confirmed: until the time step ends, and never another answer than yes.
//!
//! Kept is a keyed digest of name, realm, token and time step, with a key that this process made for itself:
//! no token can be found out from it. What was confirmed in one step is another claim in the next one, so that
//! nothing needs to be removed in time; what is not used falls out when there are too many.

use std::time::{Duration, Instant};

use quick_cache::sync::{Cache, DefaultLifecycle, PlaceholderGuard};
use quick_cache::{DefaultHashBuilder, UnitWeighter};
use ring::hmac;

use crate::clock::{Moment, UnixTime};
use crate::entry::PrincipalRef;
use crate::otp::Token;
use crate::secret::fill_random;

/// A time step of the gate's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    number: UnixTime,
    /// Its end at the latest, whatever happens to the wall clock.
    end: Instant,
}

impl Step {
    pub(super) fn of(now: Moment, step_seconds: u32) -> Self {
        let step_seconds = u64::from(step_seconds.max(1));
        let left = step_seconds - now.unix % step_seconds;
        Self { number: now.unix / step_seconds, end: now.monotonic + Duration::from_secs(left) }
    }
}

/// Stands for a claim in a time step.
pub(super) type Print = [u8; 32];

/// One place of [`Memory::answers`], of quick_cache's own kind.
type Guard<'a> = PlaceholderGuard<
    'a,
    Print,
    Instant,
    UnitWeighter,
    DefaultHashBuilder,
    DefaultLifecycle<Print, Instant>,
>;

pub(super) struct Memory {
    key: hmac::Key,
    /// When each is forgotten; where uses are counted, at once.
    answers: Cache<Print, Instant>,
}

/// What is known of a claim.
pub(super) enum Found<'a> {
    /// The server confirmed it in this time step.
    Remembered,
    /// It did, but counts uses, so that each is a question of its own; or in a step of this number that is over,
    /// as the clock was set back.
    Outdated,
    /// Nothing; whoever asks the same meanwhile waits for this place to be filled or dropped.
    Nothing(Place<'a>),
}

/// Where a yes is to be remembered.
pub(super) struct Place<'a>(Guard<'a>);

impl Place<'_> {
    pub(super) fn remember(self, step: Step) {
        self.fill(step.end);
    }

    /// Remembers no yes, but that nobody needs to wait for another's question.
    pub(super) fn leave_to_each(self, now: Moment) {
        self.fill(now.monotonic);
    }

    fn fill(self, end: Instant) {
        // It fails if the entry was removed meanwhile: then nothing is remembered.
        let _ = self.0.insert(end);
    }
}

impl Memory {
    /// Room for so many claims; `None` if that is none.
    pub(super) fn new(entries: usize) -> Option<Self> {
        let mut key = zeroize::Zeroizing::new([0; 32]);
        fill_random(key.as_mut_slice());
        (entries > 0).then(|| Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, key.as_slice()),
            answers: Cache::new(entries),
        })
    }

    pub(super) fn print(&self, who: PrincipalRef<'_>, token: &Token, step: Step) -> Print {
        let mut context = hmac::Context::with_key(&self.key);
        for part in [who.realm(), who.name(), token.expose()] {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part.as_bytes());
        }
        context.update(&step.number.to_be_bytes());
        context.sign().as_ref().try_into().expect("SHA-256 has 32 bytes")
    }

    /// Waits while somebody else asks the same.
    pub(super) async fn find(&self, print: &Print, now: Moment) -> Found<'_> {
        match self.answers.get_value_or_guard_async(print).await {
            Ok(end) if now.monotonic < end => Found::Remembered,
            Ok(_) => Found::Outdated,
            Err(place) => Found::Nothing(Place(place)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock as _, ManualClock};

    fn who<'a>(name: &'a str, realm: &'a str) -> PrincipalRef<'a> {
        PrincipalRef::parse(name, realm).unwrap()
    }

    async fn remembers(memory: &Memory, print: &Print, now: Moment) -> bool {
        matches!(memory.find(print, now).await, Found::Remembered)
    }

    async fn confirm(memory: &Memory, print: &Print, now: Moment, step: Step) {
        let Found::Nothing(place) = memory.find(print, now).await else { panic!("it is known") };
        place.remember(step);
    }

    #[tokio::test]
    async fn what_was_confirmed_ends_with_its_step() {
        let clock = ManualClock::at(1_700_000_007);
        let memory = Memory::new(100).unwrap();
        let token = Token::parse("123456").unwrap();
        let print = |now| memory.print(who("a", "b"), &token, Step::of(now, 30));
        let now = clock.now();
        confirm(&memory, &print(now), now, Step::of(now, 30)).await;
        // 1,700,000,010 begins a step.
        for (seconds, known) in [(0, true), (2, true), (1, false), (29, false), (1, false)] {
            clock.advance(Duration::from_secs(seconds));
            let now = clock.now();
            assert_eq!(remembers(&memory, &print(now), now).await, known, "{}", now.unix);
        }
        // The wall clock is set back: the same step again, later.
        let back = Moment { unix: 1_700_000_007, monotonic: clock.monotonic() };
        assert!(matches!(memory.find(&print(back), back).await, Found::Outdated));
    }

    #[tokio::test]
    async fn counted_claims_pass_never_and_wait_for_nobody() {
        let now = ManualClock::at(0).now();
        let (memory, step) = (Memory::new(100).unwrap(), Step::of(now, 30));
        let print = memory.print(who("a", "b"), &Token::parse("123456").unwrap(), step);
        let Found::Nothing(place) = memory.find(&print, now).await else { panic!("it is known") };
        place.leave_to_each(now);
        let both = tokio::join!(memory.find(&print, now), memory.find(&print, now));
        assert!(matches!(both, (Found::Outdated, Found::Outdated)));
    }

    #[tokio::test]
    async fn only_the_very_claim_is_confirmed() {
        let now = ManualClock::at(0).now();
        let (memory, step) = (Memory::new(100).unwrap(), Step::of(now, 30));
        let token = |text| Token::parse(text).unwrap();
        let print = |name, realm, text| memory.print(who(name, realm), &token(text), step);
        confirm(&memory, &print("ab", "c", "123456"), now, step).await;
        assert!(remembers(&memory, &print("ab", "c", "123456"), now).await);
        for (name, realm, text) in [
            ("a", "bc", "123456"),
            ("c", "ab", "123456"),
            ("ab", "c", "123457"),
            ("ab", "c", "1234560"),
        ] {
            assert!(!remembers(&memory, &print(name, realm, text), now).await, "{name} {realm}");
        }
        let other = Memory::new(100).unwrap();
        let prints = [&memory, &other].map(|m| m.print(who("a", "b"), &token("123456"), step));
        assert_ne!(prints[0], prints[1], "each process has a key of its own");
    }

    #[tokio::test]
    async fn memory_is_bounded_and_may_be_none() {
        assert!(Memory::new(0).is_none());
        let now = ManualClock::at(0).now();
        let (memory, step) = (Memory::new(50).unwrap(), Step::of(now, 30));
        for n in 100_000..101_000 {
            let token = Token::parse(&n.to_string()).unwrap();
            confirm(&memory, &memory.print(who("a", "b"), &token, step), now, step).await;
        }
        assert!((1..=50).contains(&memory.answers.len()), "{}", memory.answers.len());
    }
}
