//! RFC 6238 on totp-rs: no I/O, no clock.

use std::fmt::Write as _;
use std::num::NonZeroU32;

use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use totp_rs::{Builder, Totp};
use zeroize::Zeroize;

use crate::clock::UnixTime;
use crate::entry::{Algorithm, DIGITS, Seed};

/// How tokens are made: the same on both sides, or nothing verifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenParams {
    /// HMAC algorithm.
    pub algorithm: Algorithm,
    /// Digits of a token.
    pub digits: u8,
    /// Length of a time step.
    pub step_seconds: u32,
}

impl Default for TokenParams {
    /// What every TOTP client assumes: SHA1, 6 digits, 30 seconds.
    fn default() -> Self {
        Self { algorithm: Algorithm::Sha1, digits: 6, step_seconds: 30 }
    }
}

/// How often one token may be used, by different requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reuse {
    /// As often as its window lasts.
    #[default]
    Window,
    /// At most so many times; 1 is what RFC 6238 section 5.2 asks for.
    Times(NonZeroU32),
}

impl Reuse {
    /// Once.
    pub const ONCE: Self = Self::Times(NonZeroU32::MIN);

    /// Whether this allows more uses than `other`.
    #[must_use]
    pub fn is_looser_than(self, other: Self) -> bool {
        match (self, other) {
            (_, Self::Window) => false,
            (Self::Window, Self::Times(_)) => true,
            (Self::Times(this), Self::Times(that)) => this > that,
        }
    }
}

/// The most digits of a claimed token.
const MAX_DIGITS: usize = *DIGITS.end() as usize;

/// The digits that a client sent: ASCII only, 6 to 8 of them. Cannot print itself.
#[derive(Clone)]
pub struct Token {
    digits: [u8; MAX_DIGITS],
    len: usize,
}

impl Token {
    /// The digits; the name says that care is due.
    #[must_use]
    pub fn expose(&self) -> &str {
        std::str::from_utf8(&self.digits[..self.len]).expect("digits are ASCII")
    }

    /// Takes exactly 6 to 8 ASCII digits, nothing else: no blanks, no sign, no other script.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        let len_fits = u8::try_from(bytes.len()).is_ok_and(|len| DIGITS.contains(&len));
        if !len_fits || !bytes.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let mut digits = [0; MAX_DIGITS];
        digits[..bytes.len()].copy_from_slice(bytes);
        Some(Self { digits, len: bytes.len() })
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.digits.zeroize();
    }
}

impl ConstantTimeEq for Token {
    fn ct_eq(&self, other: &Self) -> Choice {
        self.digits.ct_eq(&other.digits) & self.len.ct_eq(&other.len)
    }
}

impl std::fmt::Write for Token {
    /// Appends digits: how a generated token is rendered without allocating.
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = self.digits.get_mut(self.len..self.len + text.len()).ok_or(std::fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[token]")
    }
}

/// Which time step a token belonged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatchedStep {
    /// The counter T of RFC 6238 section 4.2.
    pub counter: u64,
    /// The matched counter less the current one: a caller's clock drift, in steps.
    pub offset: i32,
}

/// A seed made ready to check tokens. Cannot print itself; wiped when dropped.
pub struct Generator(Totp);

impl Generator {
    /// Joins a seed and its parameters. Seeds of any length are taken: ungleich-otp's first ones
    /// have 80 bits, fewer than RFC 4226 asks for.
    #[must_use]
    pub fn new(seed: &Seed, params: TokenParams) -> Self {
        let algorithm = match params.algorithm {
            Algorithm::Sha1 => totp_rs::Algorithm::SHA1,
            Algorithm::Sha256 => totp_rs::Algorithm::SHA256,
            Algorithm::Sha512 => totp_rs::Algorithm::SHA512,
        };
        Self(
            Builder::new()
                .with_algorithm(algorithm)
                .with_digits(params.digits.clamp(*DIGITS.start(), *DIGITS.end()))
                .with_step_duration(u64::from(params.step_seconds.max(1)))
                .with_secret(seed.bytes().as_slice())
                .build_noncompliant(),
        )
    }

    /// The token of the step that `at` lies in.
    #[must_use]
    pub fn token_at(&self, at: UnixTime) -> String {
        self.0.generate(at).to_string()
    }

    /// Seconds that the token of `at` stays the current one.
    #[must_use]
    pub fn seconds_left(&self, at: UnixTime) -> u64 {
        self.0.step() - at % self.0.step()
    }

    /// Length of a time step.
    #[must_use]
    pub fn step_seconds(&self) -> u64 {
        self.0.step()
    }

    /// Checks `token` against the current step and `skew` steps on either side.
    ///
    /// Every candidate is computed and compared in constant time, whichever matches.
    #[must_use]
    pub fn check(&self, token: &Token, at: UnixTime, skew: u8) -> Option<MatchedStep> {
        let current = at / self.0.step();
        // Nearest first, so that of two steps with the same token the nearer one is reported.
        let around = (1..=u64::from(skew))
            .flat_map(|distance| [current.checked_sub(distance), current.checked_add(distance)])
            .flatten();
        let mut found = Choice::from(0);
        let mut matched = 0_u64;
        for counter in std::iter::once(current).chain(around) {
            let equal = self.token_of(counter).ct_eq(token) & !found;
            matched.conditional_assign(&counter, equal);
            found |= equal;
        }
        bool::from(found).then(|| MatchedStep {
            counter: matched,
            offset: i32::try_from(matched.cast_signed() - current.cast_signed()).unwrap_or(0),
        })
    }

    fn token_of(&self, counter: u64) -> Token {
        let mut token = Token { digits: [0; MAX_DIGITS], len: 0 };
        // Token implements Display without allocating.
        let generated = self.0.generate(counter.saturating_mul(self.0.step()));
        write!(token, "{generated}").expect("a token has at most eight digits");
        token
    }
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[generator]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use data_encoding::BASE32_NOPAD;
    use proptest::prelude::*;

    fn seed(bytes: &[u8]) -> Seed {
        Seed::parse(&BASE32_NOPAD.encode(bytes)).unwrap()
    }

    fn params(algorithm: Algorithm, digits: u8) -> TokenParams {
        TokenParams { algorithm, digits, ..TokenParams::default() }
    }

    /// RFC 6238 appendix B, with the seed lengths of its erratum 2866.
    #[test]
    fn rfc_6238_vectors() {
        let key = b"1234567890".repeat(7);
        let table = [
            (59, "94287082", "46119246", "90693936"),
            (1_111_111_109, "07081804", "68084774", "25091201"),
            (1_111_111_111, "14050471", "67062674", "99943326"),
            (1_234_567_890, "89005924", "91819424", "93441116"),
            (2_000_000_000, "69279037", "90698825", "38618901"),
            (20_000_000_000, "65353130", "77737706", "47863826"),
        ];
        for (at, sha1, sha256, sha512) in table {
            for (algorithm, length, expected) in [
                (Algorithm::Sha1, 20, sha1),
                (Algorithm::Sha256, 32, sha256),
                (Algorithm::Sha512, 64, sha512),
            ] {
                let seed = seed(&key[..length]);
                let eight = Generator::new(&seed, params(algorithm, 8));
                assert_eq!(eight.token_at(at), expected, "{algorithm:?} at {at}");
                // Fewer digits are the last ones of the longer token.
                let six = Generator::new(&seed, params(algorithm, 6));
                assert_eq!(six.token_at(at), expected[2..]);
            }
        }
    }

    #[test]
    fn the_end_of_time_is_a_time() {
        let generator = Generator::new(&seed(b"12345678901234567890"), TokenParams::default());
        for (at, left) in [(0, 30), (29, 1), (30, 30), (u64::MAX, 15), (u64::MAX - 15, 30)] {
            assert_eq!(generator.seconds_left(at), left, "{at}");
            let token = Token::parse(&generator.token_at(at)).unwrap();
            assert!(generator.check(&token, at, 10).is_some());
        }
    }

    /// RFC 4226 appendix D: counters 0 to 9.
    #[test]
    fn rfc_4226_vectors() {
        let generator = Generator::new(&seed(b"12345678901234567890"), TokenParams::default());
        let expected = [
            "755224", "287082", "359152", "969429", "338314", "254676", "287922", "162583",
            "399871", "520489",
        ];
        for (counter, token) in (0_u64..).zip(expected) {
            assert_eq!(generator.token_at(counter * 30), token);
        }
    }

    #[test]
    fn the_window_reports_which_step_matched() {
        let generator = Generator::new(&seed(b"12345678901234567890"), TokenParams::default());
        let now = 1_111_111_111_u64;
        for steps in -4_i64..=4 {
            let at = now.saturating_add_signed(steps * 30);
            let token = Token::parse(&generator.token_at(at)).unwrap();
            let matched = generator.check(&token, now, 3);
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
        let generator = Generator::new(&seed(b"12345678901234567890"), TokenParams::default());
        let token = Token::parse("755224").unwrap();
        assert_eq!(generator.check(&token, 0, 3).unwrap().offset, 0);
    }

    #[test]
    fn only_ascii_digits_are_tokens() {
        for good in ["123456", "1234567", "00000000"] {
            assert!(Token::parse(good).is_some(), "{good}");
        }
        for bad in [
            "",
            "12345",
            "123456789",
            " 123456",
            "123 456",
            "+12345",
            "-123456",
            "１２３４５６",
            "12345a",
        ] {
            assert!(Token::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn another_number_of_digits_never_matches() {
        let generator = Generator::new(&seed(b"12345678901234567890"), params(Algorithm::Sha1, 8));
        assert!(generator.check(&Token::parse("94287082").unwrap(), 59, 0).is_some());
        assert!(generator.check(&Token::parse("287082").unwrap(), 59, 0).is_none());
        assert!(generator.check(&Token::parse("4287082").unwrap(), 59, 0).is_none());
    }

    proptest! {
        #[test]
        fn what_is_generated_is_accepted(
            key in proptest::collection::vec(any::<u8>(), 1..64),
            at in 0_u64..1 << 40,
            digits in DIGITS,
        ) {
            let generator = Generator::new(&seed(&key), params(Algorithm::Sha256, digits));
            let token = Token::parse(&generator.token_at(at)).unwrap();
            prop_assert_eq!(generator.check(&token, at, 1).unwrap().offset, 0);
        }

        #[test]
        fn parsing_never_panics(text in ".*") {
            let _ = Token::parse(&text);
        }
    }
}
