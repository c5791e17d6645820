//! RFC 6238: no I/O, no clock. Tokens are made by totp-rs; the gate checks them with seeds that are keyed once
//! (`checker`).

use std::num::NonZeroU32;

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

    /// How many digits.
    #[cfg(feature = "server")]
    pub(crate) fn length(&self) -> usize {
        self.len
    }

    /// The digits as a number, without looking at what they are.
    #[cfg(feature = "server")]
    pub(crate) fn number(&self) -> u32 {
        let digits = &self.digits[..self.len];
        digits.iter().fold(0, |number, digit| 10 * number + u32::from(*digit - b'0'))
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.digits.zeroize();
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

#[cfg(feature = "server")]
impl MatchedStep {
    pub(crate) fn of(counter: u64, current: u64) -> Self {
        let offset = counter.wrapping_sub(current).cast_signed();
        Self { counter, offset: i32::try_from(offset).unwrap_or(0) }
    }
}

impl TokenParams {
    /// Never more or fewer than RFC 4226 allows.
    pub(crate) fn digits_in_bounds(self) -> u8 {
        self.digits.clamp(*DIGITS.start(), *DIGITS.end())
    }

    fn step(self) -> u64 {
        u64::from(self.step_seconds.max(1))
    }
}

/// A seed made ready to make tokens. Cannot print itself; wiped when dropped.
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
                .with_digits(params.digits_in_bounds())
                .with_step_duration(params.step())
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
            assert!(Token::parse(&generator.token_at(at)).is_some());
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

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".*") {
            let _ = Token::parse(&text);
        }
    }
}
