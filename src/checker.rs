//! Checks tokens, for every request that a gate passes.
//!
//! What is kept of a seed is HMAC's state behind the padded key: each candidate takes two blocks of the hash
//! from there. totp-rs, which makes the tokens, would key anew for each, and take four.

use std::sync::atomic::{AtomicU64, Ordering};

use hmac::KeyInit;
use hmac::block_api::HmacCore;
use hmac::digest::Output;
use hmac::digest::block_api::{Buffer, FixedOutputCore};
use sha1::Sha1;
use sha2::{Sha256, Sha512};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use zeroize::Zeroize as _;

use crate::clock::UnixTime;
use crate::entry::{Algorithm, Seed};
use crate::otp::{MatchedStep, Token, TokenParams};

#[cfg(test)]
thread_local! {
    /// How many tokens this thread has computed: what checking costs.
    pub(crate) static COMPUTED: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// Bits of a token's number; the counter has the others.
const NUMBER_BITS: u32 = 27;
const MAX_COUNTER: u64 = u64::MAX >> NUMBER_BITS;

/// A seed made ready to check tokens. Cannot print itself; wiped when dropped.
pub struct Checker {
    keyed: Keyed,
    /// The last token that was right, `counter << NUMBER_BITS | number`; 0: none.
    last: AtomicU64,
    step_seconds: u32,
    digits: u8,
}

/// HMAC behind its key. Entries are small where they have the usual algorithm.
enum Keyed {
    Sha1(HmacCore<Sha1>),
    Sha256(Box<HmacCore<Sha256>>),
    Sha512(Box<HmacCore<Sha512>>),
}

impl Checker {
    /// As [`Generator::new`](crate::otp::Generator::new).
    #[must_use]
    pub fn new(seed: &Seed, params: TokenParams) -> Self {
        let key = seed.bytes();
        let keyed = match params.algorithm {
            Algorithm::Sha1 => Keyed::Sha1(after_key(&key)),
            Algorithm::Sha256 => Keyed::Sha256(Box::new(after_key(&key))),
            Algorithm::Sha512 => Keyed::Sha512(Box::new(after_key(&key))),
        };
        let (step_seconds, digits) = (params.step_seconds.max(1), params.digits_in_bounds());
        Self { keyed, last: AtomicU64::new(0), step_seconds, digits }
    }

    /// Length of a time step.
    #[must_use]
    pub fn step_seconds(&self) -> u64 {
        self.step_seconds.into()
    }

    /// The token of the step that `at` lies in.
    #[must_use]
    pub fn token_at(&self, at: UnixTime) -> Token {
        let (number, width) = (self.number_of(at / self.step_seconds()), usize::from(self.digits));
        Token::parse(&format!("{number:0width$}")).expect("so many digits")
    }

    /// Checks `token` against the current step and `skew` steps on either side.
    ///
    /// Every candidate is computed and compared in constant time, whichever matches.
    #[must_use]
    pub fn check(&self, token: &Token, at: UnixTime, skew: u8) -> Option<MatchedStep> {
        let (current, claimed) = (at / self.step_seconds(), token.number());
        // Nearest first, so that of two steps with the same token the nearer one is reported.
        let around = (1..=u64::from(skew))
            .flat_map(|distance| [current.checked_sub(distance), current.checked_add(distance)])
            .flatten();
        let mut found = Choice::from(0);
        let mut matched = 0_u64;
        for counter in std::iter::once(current).chain(around) {
            let equal = self.number_of(counter).ct_eq(&claimed) & self.is_as_long(token) & !found;
            matched.conditional_assign(&counter, equal);
            found |= equal;
        }
        bool::from(found).then(|| MatchedStep::of(matched, current))
    }

    /// The step of `token` if it is the one that was last [remembered](Self::remember) and its step is among
    /// those that [`Self::check`] looks at: then that would find it too, or a nearer step that has the same
    /// token by chance. `None` says nothing.
    ///
    /// Callers send a token as often as its window lasts; so it is computed once.
    #[must_use]
    pub fn recall(&self, token: &Token, at: UnixTime, skew: u8) -> Option<MatchedStep> {
        let last = self.last.load(Ordering::Relaxed);
        let (counter, current) = (last >> NUMBER_BITS, at / self.step_seconds());
        let claimed = counter << NUMBER_BITS | u64::from(token.number());
        let equal = bool::from(claimed.ct_eq(&last) & self.is_as_long(token));
        let is_accepted = last != 0 && counter.abs_diff(current) <= u64::from(skew);
        (equal && is_accepted).then(|| MatchedStep::of(counter, current))
    }

    /// Remembers that `token` is right, and whose step it is. Not for seeds that several names share: one
    /// would be told from another by the time that it takes.
    pub fn remember(&self, token: &Token, step: MatchedStep) {
        let last = step.counter << NUMBER_BITS | u64::from(token.number());
        if step.counter <= MAX_COUNTER && self.last.load(Ordering::Relaxed) != last {
            self.last.store(last, Ordering::Relaxed);
        }
    }

    /// Numbers of other lengths may be equal.
    fn is_as_long(&self, token: &Token) -> Choice {
        token.length().ct_eq(&usize::from(self.digits))
    }

    /// The token of a step, as a number.
    fn number_of(&self, counter: u64) -> u32 {
        #[cfg(test)]
        COMPUTED.set(COMPUTED.get() + 1);
        let code = match &self.keyed {
            Keyed::Sha1(keyed) => code_of(keyed.clone(), counter),
            Keyed::Sha256(keyed) => code_of(HmacCore::clone(keyed), counter),
            Keyed::Sha512(keyed) => code_of(HmacCore::clone(keyed), counter),
        };
        code % 10_u32.pow(self.digits.into())
    }
}

fn after_key<H: KeyInit>(key: &[u8]) -> H {
    H::new_from_slice(key).expect("HMAC takes keys of any length")
}

/// RFC 4226, section 5.3: the HMAC of the counter, cut to 31 bits.
fn code_of<H: FixedOutputCore>(mut keyed: H, counter: u64) -> u32 {
    let mut mac = Output::<H>::default();
    keyed.finalize_fixed_core(&mut Buffer::<H>::new(&counter.to_be_bytes()), &mut mac);
    let offset = usize::from(mac.last().expect("no hash is empty") & 0xf);
    let code = mac[offset..].first_chunk().expect("the shortest one has 20 bytes");
    let code = u32::from_be_bytes(*code) & 0x7fff_ffff;
    mac.as_mut_slice().zeroize();
    code
}

impl Drop for Checker {
    /// The states wipe themselves.
    fn drop(&mut self) {
        self.last.get_mut().zeroize();
    }
}

impl std::fmt::Debug for Checker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[checker]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::otp::Generator;
    use data_encoding::BASE32_NOPAD;
    use proptest::prelude::*;

    fn seed(bytes: &[u8]) -> Seed {
        Seed::parse(&BASE32_NOPAD.encode(bytes)).unwrap()
    }

    /// Makes and checks tokens of the seed that RFC 4226 uses.
    fn both(params: TokenParams) -> (Generator, Checker) {
        let seed = seed(b"12345678901234567890");
        (Generator::new(&seed, params), Checker::new(&seed, params))
    }

    fn token(text: &str) -> Token {
        Token::parse(text).unwrap()
    }

    /// RFC 4226 appendix D: counters 0 to 9.
    #[test]
    fn rfc_4226_vectors() {
        let (_, checker) = both(TokenParams::default());
        let expected = [
            "755224", "287082", "359152", "969429", "338314", "254676", "287922", "162583",
            "399871", "520489",
        ];
        for (counter, text) in (0_u64..).zip(expected) {
            assert_eq!(checker.token_at(counter * 30).expose(), text);
        }
    }

    /// RFC 6238 appendix B, with the seed lengths of its erratum 2866.
    #[test]
    fn rfc_6238_vectors() {
        let key = b"1234567890".repeat(7);
        for (algorithm, length, expected) in [
            (Algorithm::Sha1, 20, "65353130"),
            (Algorithm::Sha256, 32, "77737706"),
            (Algorithm::Sha512, 64, "47863826"),
        ] {
            let params = TokenParams { algorithm, digits: 8, ..TokenParams::default() };
            let checker = Checker::new(&seed(&key[..length]), params);
            assert_eq!(checker.token_at(20_000_000_000).expose(), expected);
        }
    }

    #[test]
    fn the_end_of_time_is_a_time() {
        let (generator, checker) = both(TokenParams::default());
        for at in [0, 29, 30, u64::MAX, u64::MAX - 15] {
            let token = token(&generator.token_at(at));
            let step = checker.check(&token, at, 10).unwrap();
            checker.remember(&token, step);
            assert_eq!(checker.recall(&token, at, 10).is_some(), step.counter <= MAX_COUNTER);
        }
    }

    #[test]
    fn the_window_reports_which_step_matched() {
        let (generator, checker) = both(TokenParams::default());
        let now = 1_111_111_111_u64;
        for steps in -4_i64..=4 {
            let at = now.saturating_add_signed(steps * 30);
            let matched = checker.check(&token(&generator.token_at(at)), now, 3);
            if steps.abs() <= 3 {
                let matched = matched.unwrap();
                assert_eq!(i64::from(matched.offset), steps);
                assert_eq!(matched.counter, at / 30);
            } else {
                assert_eq!(matched, None);
            }
        }
    }

    #[test]
    fn the_start_of_time_is_no_trap() {
        let (_, checker) = both(TokenParams::default());
        assert_eq!(checker.check(&token("755224"), 0, 3).unwrap().offset, 0);
        // It looks as nothing does that is remembered.
        assert_eq!(checker.recall(&token("000000"), 0, 3), None);
    }

    #[test]
    fn another_number_of_digits_never_matches() {
        let (_, checker) = both(TokenParams { digits: 8, ..TokenParams::default() });
        let at = 1_111_111_109;
        let step = checker.check(&token("07081804"), at, 0).unwrap();
        checker.remember(&token("07081804"), step);
        assert_eq!(checker.recall(&token("07081804"), at, 0), Some(step));
        for short in ["081804", "7081804"] {
            assert_eq!(checker.check(&token(short), at, 0), None);
            assert_eq!(checker.recall(&token(short), at, 0), None);
        }
    }

    #[test]
    fn what_is_remembered_ends_with_its_window() {
        for skew in 0..=3 {
            let (generator, checker) = both(TokenParams::default());
            let counter = 60_000_000;
            let token = token(&generator.token_at(counter * 30));
            checker.remember(&token, checker.check(&token, counter * 30, skew).unwrap());
            for now in counter - 5..=counter + 5 {
                for at in [now * 30, now * 30 + 29] {
                    let recalled = checker.recall(&token, at, skew);
                    let is_inside = now.abs_diff(counter) <= u64::from(skew);
                    assert_eq!(recalled.is_some(), is_inside, "{skew} {at}");
                    assert_eq!(recalled, checker.check(&token, at, skew));
                }
            }
        }
    }

    #[test]
    fn it_does_not_print() {
        assert_eq!(format!("{:?}", both(TokenParams::default()).1), "[checker]");
    }

    fn params(
        digits: std::ops::Range<u8>,
        step_seconds: std::ops::Range<u32>,
    ) -> impl Strategy<Value = TokenParams> {
        let algorithm =
            proptest::sample::select(vec![Algorithm::Sha1, Algorithm::Sha256, Algorithm::Sha512]);
        (algorithm, digits, step_seconds).prop_map(|(algorithm, digits, step_seconds)| {
            TokenParams { algorithm, digits, step_seconds }
        })
    }

    proptest! {
        /// Also with keys that are longer than a block, and parameters out of bounds.
        #[test]
        fn tokens_are_those_of_totp_rs(
            key in proptest::collection::vec(any::<u8>(), 1..160),
            params in params(0..12, 0..4000),
            at in prop_oneof![0_u64..1 << 40, any::<u64>()],
        ) {
            let seed = seed(&key);
            let expected = Generator::new(&seed, params).token_at(at);
            let checker = Checker::new(&seed, params);
            let made = checker.token_at(at);
            prop_assert_eq!(made.expose(), &expected);
            prop_assert_eq!(checker.check(&token(&expected), at, 1).unwrap().offset, 0);
        }

        /// Tokens around the window, wrong ones among them, as time goes on and back: whoever remembers
        /// accepts what is accepted without, and nothing else. Eight digits, so that no two are equal.
        #[test]
        fn remembering_changes_nothing(
            params in params(8..9, 5..60),
            skew in 0_u8..3,
            calls in proptest::collection::vec((-4_i64..=4, -4_i64..=4, any::<bool>()), 1..40),
        ) {
            let (generator, checker) = both(params);
            let plain = both(params).1;
            let step = i64::from(params.step_seconds);
            let mut now = 1_800_000_000_u64;
            for (pause, offset, wrong) in calls {
                now = now.saturating_add_signed(pause * step / 3);
                let mut text = generator.token_at(now.saturating_add_signed(offset * step));
                if wrong {
                    let last = if text.pop() == Some('0') { '1' } else { '0' };
                    text.push(last);
                }
                let token = token(&text);
                let expected = plain.check(&token, now, skew);
                let recalled = checker.recall(&token, now, skew);
                prop_assert!(recalled.is_none() || recalled == expected);
                let found = recalled.or_else(|| checker.check(&token, now, skew));
                prop_assert_eq!(found, expected);
                if let Some(step) = found {
                    checker.remember(&token, step);
                }
            }
        }
    }
}
