//! JSON bodies: one level of an object is read; deeper ones are skipped without recursion.

use std::borrow::Cow;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer as _};
use serde_json::value::RawValue;

use super::body::Fields;
use super::error::ApiError;
use super::value::Value;

/// How deep arrays and objects may be nested; no field needs any.
const MAX_DEPTH: usize = 64;

/// Reads the known fields of a JSON text.
///
/// # Errors
/// If it is no JSON, is nested too deeply, or gives a known field twice.
pub(super) fn parse(text: &str) -> Result<Fields, ApiError> {
    // Few brackets cannot nest deeply, and are counted fast.
    let brackets = text.bytes().filter(|byte| matches!(byte, b'{' | b'[')).count();
    if brackets > MAX_DEPTH && depth(text) > MAX_DEPTH {
        return Err(ApiError::Malformed("JSON parse error - nested too deeply".into()));
    }
    // RawValue is checked iteratively.
    let raw: &RawValue = serde_json::from_str(text).map_err(|e| syntax(&e))?;
    match raw.get().as_bytes().first() {
        Some(b'{') => {}
        Some(b'[') => return Ok(Fields::other("list")),
        Some(b'"') => return Ok(Fields::other("str")),
        Some(b't' | b'f') => return Ok(Fields::other("bool")),
        Some(b'n') => return Ok(Fields::other("NoneType")),
        _ => return Ok(Fields::other(if is_integer(raw.get()) { "int" } else { "float" })),
    }
    let mut fields = Fields::default();
    let mut refusal = None;
    serde_json::Deserializer::from_str(raw.get())
        .deserialize_map(Members(|name: &str, raw: &RawValue| {
            match fields.add(name, || value_of(raw)) {
                Ok(()) => true,
                Err(error) => {
                    refusal = Some(error);
                    false
                }
            }
        }))
        .map_err(|e| refusal.unwrap_or_else(|| syntax(&e)))?;
    Ok(fields)
}

/// Where a text stops being JSON. Never what stands there: it may be a token.
fn syntax(error: &serde_json::Error) -> ApiError {
    ApiError::Malformed(format!(
        "JSON parse error - line {} column {}",
        error.line(),
        error.column()
    ))
}

/// The deepest nesting of arrays and objects, whether or not `text` is JSON.
fn depth(text: &str) -> usize {
    let (mut deepest, mut depth) = (0_usize, 0_usize);
    let (mut in_string, mut escaped) = (false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// A member's name. [`Cow`] alone would always be a copy.
#[derive(Deserialize)]
#[serde(transparent)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

/// Hands every member of an object to a function, which tells whether to go on.
struct Members<F>(F);

impl<'de, F: FnMut(&str, &RawValue) -> bool> Visitor<'de> for Members<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some((Key(name), raw)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
            if !(self.0)(&name, raw) {
                return Err(serde::de::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

fn value_of(raw: &RawValue) -> Result<Value, ApiError> {
    let text = raw.get();
    Ok(match text.as_bytes().first() {
        // Without escapes it stands there as it is.
        Some(b'"') if !text.contains('\\') => Value::text(text[1..text.len() - 1].to_owned()),
        Some(b'"') => decoded(text)?,
        Some(b'n') => Value::Null,
        Some(b't') => Value::Bool(true),
        Some(b'f') => Value::Bool(false),
        Some(b'[' | b'{') => Value::Other,
        _ => Value::Number(number(text).into()),
    })
}

/// A string that may have escapes.
fn decoded(text: &str) -> Result<Value, ApiError> {
    let mut json = serde_json::Deserializer::from_str(text);
    json.deserialize_bytes(Wtf8).map_err(|e| syntax(&e))
}

fn is_integer(number: &str) -> bool {
    !number.contains(['.', 'e', 'E'])
}

/// A number as ungleich-otp turns it into text: an integer as its digits, any other as the shortest
/// decimal of its double (`1.50` is `1.5`).
fn number(text: &str) -> String {
    if is_integer(text) {
        return if text == "-0" { "0".into() } else { text.into() };
    }
    text.parse::<f64>().map_or_else(|_| text.into(), |n| format!("{n:?}"))
}

/// Reads a string, in which `\ud800` and the like may stand alone (WTF-8).
struct Wtf8;

impl Visitor<'_> for Wtf8 {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Value, E> {
        let mut clean = Vec::with_capacity(bytes.len());
        let mut surrogate = None;
        let mut rest = bytes;
        while let [byte, after @ ..] = rest {
            // A surrogate is ED A0..BF 80..BF; other characters have 80..9F after ED.
            if let (0xed, [second @ 0xa0..=0xbf, third, after @ ..]) = (*byte, after) {
                let unit = 0xd000 | u16::from(second & 0x3f) << 6 | u16::from(third & 0x3f);
                surrogate.get_or_insert(unit);
                clean.extend_from_slice("\u{fffd}".as_bytes());
                rest = after;
            } else {
                clean.push(*byte);
                rest = after;
            }
        }
        let text = String::from_utf8(clean).map_err(|_| E::custom("not UTF-8"))?;
        Ok(Value::Text { text: text.into(), surrogate })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(json: &str) -> Value {
        parse(&format!("{{\"name\":{json}}}")).unwrap().get("name").unwrap().clone()
    }

    fn refusal(json: &str) -> String {
        parse(json).unwrap_err().to_string()
    }

    #[test]
    fn values_become_texts() {
        let text = |text: &str| Value::text(text.to_owned());
        assert!(name("\"a\\u00fc\\ud83d\\ude00\\n\"") == text("aü😀\n"));
        assert!(name("\"\\u0000\"") == text("\0"));
        assert!(
            name("\"a\\ud800b\"")
                == Value::Text { text: "a\u{fffd}b".to_owned().into(), surrogate: Some(0xd800) }
        );
        assert!(
            name("\"\\udfffx\"")
                == Value::Text { text: "\u{fffd}x".to_owned().into(), surrogate: Some(0xdfff) }
        );
        assert!(name("\"\u{d7ff}\u{e000}\"") == text("\u{d7ff}\u{e000}"));
        for (json, expected) in [
            ("123", "123"),
            ("-123456", "-123456"),
            ("-0", "0"),
            ("424242424242424242424242", "424242424242424242424242"),
            ("1.5", "1.5"),
            ("123456.0", "123456.0"),
            ("1.50", "1.5"),
            ("1e3", "1000.0"),
        ] {
            assert!(name(json) == Value::Number(expected.to_owned().into()), "{json}");
        }
        assert!(name("null") == Value::Null);
        assert!(name("false") == Value::Bool(false));
        assert!(name("{\"a\":1}") == Value::Other);
        assert!(name("[]") == Value::Other);
    }

    #[test]
    fn unknown_fields_are_skipped_and_known_ones_come_once() {
        let fields = parse(r#"{"x":1,"x":[2,{}],"name":"a"}"#).unwrap();
        assert!(fields.get("x").is_none());
        assert!(fields.get("name").is_some());
        assert_eq!(
            refusal(r#"{"auth_name":"a","auth_name":"b"}"#),
            "The field \"auth_name\" is given twice."
        );
        // the same name, escaped
        assert_eq!(
            refusal(r#"{"auth_name":"a","auth\u005fname":"b"}"#),
            "The field \"auth_name\" is given twice."
        );
    }

    #[test]
    fn syntax_errors_do_not_quote_the_body() {
        for bad in [
            "",
            "   ",
            "{",
            "{not json",
            "{\"auth_token\": 123456, }",
            "{\"auth_token\": \"123456",
            "{\"auth_token\": \"123\u{1}456\"}",
            "{'auth_token': '123456'}",
            "{\"auth_token\": 123456} x",
            "{\"auth_token\": NaN}",
            "\u{feff}{}",
        ] {
            let refusal = refusal(bad);
            assert!(refusal.starts_with("JSON parse error - line"), "{bad}: {refusal}");
            assert!(!refusal.contains("123"), "{refusal}");
        }
    }

    #[test]
    fn nesting_is_bounded_and_never_overflows_the_stack() {
        let nested = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(parse(&nested(60)).is_ok());
        assert_eq!(refusal(&nested(64)), "JSON parse error - nested too deeply");
        assert_eq!(refusal(&"[".repeat(1 << 20)), "JSON parse error - nested too deeply");
        assert!(parse(&format!("{{\"name\":\"{}\\\"[\"}}", "[".repeat(99))).is_ok());
    }

    proptest! {
        #[test]
        fn strings_without_escapes_are_read_as_others(text in r#"[^"\\]{0,20}"#) {
            let json = format!(" \"{text}\" ");
            match serde_json::from_str::<&RawValue>(&json) {
                Ok(raw) => prop_assert!(value_of(raw).unwrap() == decoded(raw.get()).unwrap()),
                Err(_) => prop_assert!(text.chars().any(|c| c < ' ')),
            }
        }

        #[test]
        fn what_is_not_an_object_has_no_fields(json in r#"\[\]|"[a-z]*"|-?[1-9][0-9]{0,9}(\.5)?|true|null"#) {
            let fields = parse(&json).unwrap();
            prop_assert!(fields.require_object().is_err());
            prop_assert!(!fields.any(""));
        }

        #[test]
        fn nothing_panics(text in "[\\{\\}\\[\\]\":,a-z0-9\\\\ü]{0,60}") {
            let _ = parse(&text);
        }
    }
}
