//! Secrets: values that cannot print themselves and wipe themselves when dropped, and the randomness
//! that they are made of.

use std::fmt;

use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

/// Fills `buffer` from the operating system's generator.
///
/// # Panics
/// If the operating system has no randomness to give: nothing secret can be made then.
pub fn fill_random(buffer: &mut [u8]) {
    SystemRandom::new().fill(buffer).expect("the operating system's random generator works");
}

/// A password, key or other secret text. `Debug` shows a placeholder; there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes `text` over.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The secret itself; the name says that care is due.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}
