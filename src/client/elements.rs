//! Splits a JSON array of objects while it arrives, so that a long list is never in memory as a whole.

use zeroize::Zeroizing;

/// Bytes of the longest element.
const MAX_ELEMENT: usize = 1 << 20;

/// How far the array is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before `[`.
    Start,
    /// Behind `[`.
    First,
    /// In an object.
    Element,
    /// Behind an object.
    Between,
    /// Behind a comma.
    Next,
    /// Behind `]`.
    End,
}

/// Not an array of objects.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoList;

/// The part of an array that is not complete yet.
pub(super) struct Elements {
    at: At,
    /// The element so far; it may hold a seed.
    element: Zeroizing<Vec<u8>>,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Elements {
    pub(super) fn new() -> Self {
        let element = Zeroizing::new(Vec::new());
        Self { at: At::Start, element, depth: 0, in_string: false, escaped: false }
    }

    /// Takes more of the text, and hands every element that is complete to `take`.
    pub(super) fn push<E: From<NoList>>(
        &mut self,
        text: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for byte in text {
            match (self.at, byte) {
                (At::Element, _) => {
                    if self.element.len() == MAX_ELEMENT {
                        return Err(NoList.into());
                    }
                    self.element.push(*byte);
                    if self.ends_with(*byte) {
                        take(&self.element)?;
                        self.element.clear();
                        self.at = At::Between;
                    }
                }
                (_, b' ' | b'\t' | b'\r' | b'\n') => {}
                (At::Start, b'[') => self.at = At::First,
                (At::First | At::Next, b'{') => {
                    self.element.push(b'{');
                    self.depth = 1;
                    self.at = At::Element;
                }
                (At::Between, b',') => self.at = At::Next,
                (At::First | At::Between, b']') => self.at = At::End,
                _ => return Err(NoList.into()),
            }
        }
        Ok(())
    }

    /// Whether the element ends with its byte `byte`.
    fn ends_with(&mut self, byte: u8) -> bool {
        if self.in_string {
            self.in_string = self.escaped || byte != b'"';
            self.escaped = !self.escaped && byte == b'\\';
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        self.depth == 0
    }

    /// Whether the array is complete.
    pub(super) fn is_complete(&self) -> bool {
        self.at == At::End
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// The elements of what arrives in these parts; `None` if it is no list.
    fn split(parts: &[&[u8]]) -> Option<Vec<Value>> {
        let (mut elements, mut found) = (Elements::new(), Vec::new());
        for part in parts {
            let take = |element: &[u8]| {
                found.push(serde_json::from_slice(element).map_err(|_| NoList)?);
                Ok::<_, NoList>(())
            };
            elements.push(part, take).ok()?;
        }
        elements.is_complete().then_some(found)
    }

    #[test]
    fn only_whole_arrays_of_objects_are_lists() {
        assert_eq!(split(&[b" [ ] \n"]), Some(vec![]));
        assert_eq!(
            split(&[br#"[{"a":"}\"]"} , {}]"#]),
            Some(vec![json!({"a": "}\"]"}), json!({})])
        );
        for bad in
            ["", "[", "{}", "[{}", "[{},]", "[,{}]", "[{}{}]", "[1]", "[[]]", "[{}]]", "[{]}]"]
        {
            assert_eq!(split(&[bad.as_bytes()]), None, "{bad}");
        }
        let long = format!("[{{\"a\":\"{}\"}}]", "x".repeat(MAX_ELEMENT));
        assert_eq!(split(&[long.as_bytes()]), None);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_where_the_parts_end(
            texts in proptest::collection::vec("[\\PC\"\\\\{}\\[\\],]{0,8}", 0..5),
            at in 0_usize..200,
        ) {
            let list: Vec<_> = texts.iter().map(|t| json!({ t.as_str(): [t, { "b": t }] })).collect();
            let text = Value::from(list.clone()).to_string();
            let (a, b) = text.as_bytes().split_at(at.min(text.len()));
            prop_assert_eq!(split(&[a, b]), Some(list));
        }
    }
}
