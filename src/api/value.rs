//! Values of fields, and the checks of Django REST framework's text fields with their messages.

use zeroize::Zeroizing;

/// A value as a request gives it. Cannot print itself, and wipes itself: it may be a token.
#[derive(Clone, PartialEq)]
pub(super) enum Value {
    /// JSON null.
    Null,
    /// A JSON boolean.
    Bool(bool),
    /// A JSON number as text.
    Number(Zeroizing<String>),
    /// A text.
    Text {
        /// Its characters; lone surrogates are replaced.
        text: Zeroizing<String>,
        /// The first lone surrogate, if any: JSON can escape one, Unicode text cannot hold it.
        surrogate: Option<u16>,
    },
    /// An array, an object, or a file.
    Other,
}

impl std::fmt::Debug for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[value]")
    }
}

impl Value {
    /// A plain text.
    pub(super) fn text(text: String) -> Self {
        Self::Text { text: text.into(), surrogate: None }
    }

    /// Whether it is a text of nothing.
    pub(super) fn is_empty_text(&self) -> bool {
        matches!(self, Self::Text { text, .. } if text.is_empty())
    }
}

/// The text of a form's part; Django replaces bytes that are no UTF-8 too.
pub(super) fn from_utf8_lossy(bytes: &[u8]) -> Value {
    Value::text(String::from_utf8_lossy(bytes).into_owned())
}

/// Rules of a text field.
#[derive(Clone, Copy, Debug)]
pub(super) struct TextRules {
    /// Most characters.
    pub(super) max_chars: usize,
    /// Whether it may be empty.
    pub(super) blank: bool,
}

/// Names, realms, tokens.
pub(super) const LABEL: TextRules = TextRules { max_chars: crate::entry::MAX_CHARS, blank: false };

/// The trimmed text of a value.
///
/// # Errors
/// The messages, all that apply.
pub(super) fn check_text(value: Option<&Value>, rules: TextRules) -> Result<&str, Vec<String>> {
    let one = |message: &str| Err(vec![message.to_owned()]);
    let (text, surrogate) = match value {
        None => return one("This field is required."),
        Some(Value::Null) => return one("This field may not be null."),
        Some(Value::Bool(_) | Value::Other) => return one("Not a valid string."),
        Some(Value::Number(text)) => (text.as_str(), None),
        Some(Value::Text { text, surrogate }) => (text.as_str(), *surrogate),
    };
    let text = text.trim();
    if text.is_empty() {
        return if rules.blank { Ok("") } else { one("This field may not be blank.") };
    }
    let mut messages = Vec::new();
    if text.chars().count() > rules.max_chars {
        let max = rules.max_chars;
        messages.push(format!("Ensure this field has no more than {max} characters."));
    }
    if text.contains('\0') {
        messages.push("Null characters are not allowed.".into());
    }
    if let Some(unit) = surrogate {
        messages.push(format!("Surrogate characters are not allowed: U+{unit:X}."));
    }
    if messages.is_empty() { Ok(text) } else { Err(messages) }
}

/// A whole number.
///
/// # Errors
/// The message.
pub(super) fn check_integer(value: &Value, min: u64, max: u64) -> Result<u64, Vec<String>> {
    let one = |message: String| Err(vec![message]);
    let text = match value {
        Value::Number(text) | Value::Text { text, surrogate: None } => text.trim(),
        _ => return one("A valid integer is required.".into()),
    };
    // To JSON, 8.0 is the integer 8.
    let text = match text.split_once('.') {
        Some((whole, zeros)) if !zeros.is_empty() && zeros.bytes().all(|b| b == b'0') => whole,
        _ => text,
    };
    match text.parse::<i128>() {
        Err(_) => one("A valid integer is required.".into()),
        Ok(n) if n < i128::from(min) => {
            one(format!("Ensure this value is greater than or equal to {min}."))
        }
        Ok(n) => u64::try_from(n)
            .ok()
            .filter(|n| *n <= max)
            .map_or_else(|| one(format!("Ensure this value is less than or equal to {max}.")), Ok),
    }
}

/// A boolean; forms spell it.
///
/// # Errors
/// The message.
pub(super) fn check_bool(value: &Value) -> Result<bool, Vec<String>> {
    let text = match value {
        Value::Null => return Err(vec!["This field may not be null.".into()]),
        Value::Bool(yes) => return Ok(*yes),
        Value::Number(text) | Value::Text { text, surrogate: None } => text.trim(),
        _ => "",
    };
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err(vec!["Must be a valid boolean.".into()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::text(text.to_owned())
    }

    fn messages(value: Option<Value>) -> Vec<String> {
        check_text(value.as_ref(), LABEL).map(str::to_owned).unwrap_err()
    }

    #[test]
    fn texts_are_trimmed_and_every_fault_is_told() {
        assert_eq!(check_text(Some(&text(" \tü\n")), LABEL), Ok("ü"));
        assert_eq!(check_text(Some(&Value::Number("42".to_owned().into())), LABEL), Ok("42"));
        assert_eq!(check_text(Some(&text(&"ü".repeat(128))), LABEL).map(str::len), Ok(256));
        assert_eq!(messages(None), ["This field is required."]);
        assert_eq!(messages(Some(Value::Null)), ["This field may not be null."]);
        assert_eq!(messages(Some(text(" "))), ["This field may not be blank."]);
        assert_eq!(messages(Some(Value::Bool(true))), ["Not a valid string."]);
        assert_eq!(messages(Some(Value::Other)), ["Not a valid string."]);
        let text = "\0".to_owned() + &"x".repeat(128);
        let all = Value::Text { text: text.into(), surrogate: Some(0xd800) };
        assert_eq!(
            messages(Some(all)),
            [
                "Ensure this field has no more than 128 characters.",
                "Null characters are not allowed.",
                "Surrogate characters are not allowed: U+D800.",
            ]
        );
    }

    #[test]
    fn integers_have_bounds() {
        assert_eq!(check_integer(&Value::Number("8".to_owned().into()), 6, 8), Ok(8));
        assert_eq!(check_integer(&text("6"), 6, 8), Ok(6));
        assert_eq!(check_integer(&Value::Number("7.0".to_owned().into()), 6, 8), Ok(7));
        for (value, message) in [
            (text("9"), "Ensure this value is less than or equal to 8."),
            (text("-1"), "Ensure this value is greater than or equal to 6."),
            (text(&"9".repeat(30)), "Ensure this value is less than or equal to 8."),
            (text(&"9".repeat(60)), "A valid integer is required."),
            (text("6.5"), "A valid integer is required."),
            (Value::Bool(true), "A valid integer is required."),
            (Value::Other, "A valid integer is required."),
        ] {
            assert_eq!(check_integer(&value, 6, 8), Err(vec![message.to_owned()]), "{message}");
        }
    }

    #[test]
    fn booleans_are_spelled() {
        assert_eq!(check_bool(&Value::Bool(false)), Ok(false));
        assert_eq!(check_bool(&text("True")), Ok(true));
        assert_eq!(check_bool(&text("off")), Ok(false));
        assert!(check_bool(&text("maybe")).is_err());
        assert!(check_bool(&Value::Null).is_err());
    }

    #[test]
    fn values_do_not_print() {
        assert_eq!(format!("{:?}", text("123456")), "[value]");
    }
}
