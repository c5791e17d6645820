//! What authenticator apps take over: an `otpauth://` URI, and the QR code that holds it.
//!
//! Both hold the seed: whoever sees them makes tokens.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use qrcode::render::{svg, unicode::Dense1x2};
use qrcode::{EcLevel, QrCode};
use zeroize::Zeroizing;

use crate::entry::Seed;
use crate::otp::TokenParams;

/// What RFC 3986 leaves unreserved. Apps decode a `+` in different ways, so a blank is `%20`.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Names are so long that no QR code can hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("name and realm are too long for a QR code")]
pub struct TooLong;

/// The URI, labelled `realm:name`, with the realm as issuer.
///
/// All that makes tokens is said, defaults too: apps differ in theirs. A `:` in a name or realm is encoded, yet
/// apps may take what stands before it for the issuer; tokens are right all the same.
#[must_use]
pub fn uri(name: &str, realm: &str, seed: &Seed, params: TokenParams) -> Zeroizing<String> {
    let encode = |text| utf8_percent_encode(text, ENCODED);
    let (issuer, account) = (encode(realm), encode(name));
    let TokenParams { algorithm, digits, step_seconds } = params;
    Zeroizing::new(format!(
        "otpauth://totp/{issuer}:{account}?secret={}&issuer={issuer}&algorithm={}&digits={digits}&period={step_seconds}",
        seed.expose(),
        algorithm.as_str(),
    ))
}

/// The QR code of a URI.
pub struct Code(QrCode);

impl Code {
    /// Makes it as small as the URI allows.
    ///
    /// # Errors
    /// If the URI holds more than a QR code.
    pub fn new(uri: &str) -> Result<Self, TooLong> {
        QrCode::with_error_correction_level(uri, EcLevel::M).map(Self).map_err(|_| TooLong)
    }

    /// As an image that scales: no script, nothing from elsewhere.
    #[must_use]
    pub fn svg(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.render::<svg::Color<'_>>().build())
    }

    /// As half blocks, two modules a character: dark on light where the terminal may be told colours (ANSI
    /// sequences), else as a terminal of light text on dark ground shows it right.
    #[must_use]
    pub fn blocks(&self, colours: bool) -> Zeroizing<String> {
        let mut blocks = self.0.render::<Dense1x2>();
        if !colours {
            blocks.dark_color(Dense1x2::Light).light_color(Dense1x2::Dark);
            return Zeroizing::new(blocks.build());
        }
        let blocks = Zeroizing::new(blocks.build());
        let lines = blocks.lines().map(|line| format!("\u{1b}[30;107m{line}\u{1b}[0m"));
        Zeroizing::new(lines.collect::<Vec<_>>().join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Algorithm;

    const SEED: &str = "PZKBPTHDGSLZBKIZ";

    fn params(algorithm: Algorithm, digits: u8, step_seconds: u32) -> TokenParams {
        TokenParams { algorithm, digits, step_seconds }
    }

    #[test]
    fn every_setting_is_said_and_names_are_encoded() {
        let seed = Seed::parse(SEED).unwrap();
        assert_eq!(
            *uri("alice", "shop", &seed, TokenParams::default()),
            "otpauth://totp/shop:alice?secret=PZKBPTHDGSLZBKIZ&issuer=shop&algorithm=SHA1&digits=6&period=30"
        );
        assert_eq!(
            *uri("info@b c&d=é", "a/b?#%:+", &seed, params(Algorithm::Sha512, 8, 60)),
            "otpauth://totp/a%2Fb%3F%23%25%3A%2B:info%40b%20c%26d%3D%C3%A9?secret=PZKBPTHDGSLZBKIZ\
             &issuer=a%2Fb%3F%23%25%3A%2B&algorithm=SHA512&digits=8&period=60"
        );
    }

    /// Another's parser reads what was meant, and makes the same tokens.
    #[test]
    fn another_program_reads_it() {
        let seed = Seed::parse(SEED).unwrap();
        for (name, realm, algorithm, digits, period) in [
            ("alice", "shop", Algorithm::Sha1, 6, 30),
            ("info@ungleich.ch", "ungleich admin", Algorithm::Sha256, 8, 60),
            ("a/b?c#d&e=f%20+", "é\"<>\\", Algorithm::Sha512, 7, 5),
        ] {
            let params = params(algorithm, digits, period);
            let read = totp_rs::Totp::from_url_unchecked(uri(name, realm, &seed, params).as_str())
                .unwrap();
            assert_eq!(read.account_name(), name);
            assert_eq!(read.issuer(), Some(realm));
            let ours = crate::otp::Generator::new(&seed, params);
            for at in [0, 1_111_111_111] {
                assert_eq!(read.generate(at).to_string(), ours.token_at(at));
            }
        }
    }

    /// The modules of half blocks: `true` is dark.
    fn modules(blocks: &str, dark: bool) -> Vec<Vec<bool>> {
        let rows = blocks.lines().flat_map(|line| {
            let row = |upper: bool| {
                let drawn = if upper { ['█', '▀'] } else { ['█', '▄'] };
                line.chars().map(|c| drawn.contains(&c) == dark).collect::<Vec<_>>()
            };
            [row(true), row(false)]
        });
        rows.collect()
    }

    /// What a decoder sees in modules, drawn large.
    fn decoded(modules: &[Vec<bool>]) -> String {
        const SCALE: usize = 4;
        let (width, height) = (modules[0].len() * SCALE, modules.len() * SCALE);
        let mut image = rqrr::PreparedImage::prepare_from_greyscale(width, height, |x, y| {
            if modules[y / SCALE][x / SCALE] { 0 } else { 255 }
        });
        let grids = image.detect_grids();
        assert_eq!(grids.len(), 1);
        grids[0].decode().unwrap().1
    }

    /// The modules of the image, which draws them as rectangles `MX Yh..v..H..V..` of 8 by 8.
    fn drawn(svg: &str) -> Vec<Vec<bool>> {
        let between = |start: &str, end: &str| {
            svg.split(start).nth(1).unwrap().split(end).next().unwrap().to_owned()
        };
        let side = between("viewBox=\"0 0 ", " ").parse::<usize>().unwrap() / 8;
        let mut modules = vec![vec![false; side]; side];
        for rectangle in between(" d=\"M", "\"").split('M') {
            let (corner, sides) = rectangle.split_once('h').unwrap();
            let number = |text: &str| text.parse::<usize>().unwrap() / 8;
            let (x, y) = corner.split_once(' ').unwrap();
            let (wide, rest) = sides.split_once('v').unwrap();
            let high = rest.split_once('H').unwrap().0;
            for row in &mut modules[number(y)..][..number(high)] {
                row[number(x)..][..number(wide)].fill(true);
            }
        }
        modules
    }

    #[test]
    fn a_decoder_reads_every_form() {
        let seed = Seed::parse(SEED).unwrap();
        for name in ["alice", &"é".repeat(60)] {
            let uri = uri(name, "shop", &seed, TokenParams::default());
            let code = Code::new(&uri).unwrap();
            assert_eq!(decoded(&drawn(&code.svg())), *uri);
            assert_eq!(decoded(&modules(&code.blocks(false), false)), *uri);
            let coloured = code.blocks(true);
            assert!(coloured.lines().all(|line| line.starts_with("\u{1b}[30;107m")));
            let plain = coloured.replace("\u{1b}[30;107m", "").replace("\u{1b}[0m", "");
            assert_eq!(decoded(&modules(&plain, true)), *uri);
        }
        let long = uri(&"é".repeat(128), &"é".repeat(128), &seed, TokenParams::default());
        assert_eq!(Code::new(&long).err(), Some(TooLong));
    }
}
