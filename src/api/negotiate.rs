//! Content negotiation: the API speaks JSON alone.

use http::header::ACCEPT;
use http::request;

use super::error::ApiError;

/// Refuses callers that take no JSON.
///
/// # Errors
/// If `?format=` or `Accept` excludes JSON.
pub(super) fn negotiate(head: &request::Parts) -> Result<(), ApiError> {
    let query = head.uri.query().unwrap_or_default();
    if form_urlencoded::parse(query.as_bytes()).any(|(k, v)| k == "format" && v != "json") {
        return Err(ApiError::NotFound);
    }
    let mut given = head.headers.get_all(ACCEPT).iter().peekable();
    if given.peek().is_none() {
        return Ok(());
    }
    let takes_json = given
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(takes_json);
    if takes_json { Ok(()) } else { Err(ApiError::NotAcceptable) }
}

fn takes_json(range: &str) -> bool {
    let mut parts = range.split(';').map(|part| part.trim().to_ascii_lowercase());
    let matches = parts.next().is_some_and(|range| {
        matches!(range.as_str(), "*/*" | "application/*" | "application/json")
    });
    // RFC 9110, section 12.4.2: a weight of 0 means "not acceptable".
    let refused = parts.any(|parameter| {
        parameter
            .strip_prefix("q=")
            .is_some_and(|weight| weight.parse::<f32>().is_ok_and(|weight| weight <= 0.0))
    });
    matches && !refused
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_all_there_is() {
        for (accept, taken) in [
            ("*/*", true),
            ("application/json", true),
            ("Application/JSON; indent=4", true),
            ("text/html, application/*;q=0.5", true),
            ("text/html", false),
            ("text/*", false),
            ("garbage", false),
            ("application/json;q=0", false),
            ("application/json-patch+json", false),
        ] {
            let request = http::Request::get("/").header(ACCEPT, accept).body(()).unwrap();
            assert_eq!(negotiate(&request.into_parts().0).is_ok(), taken, "{accept}");
        }
        let format = |query: &str| {
            let request = http::Request::get(format!("/?{query}")).body(()).unwrap();
            negotiate(&request.into_parts().0).is_ok()
        };
        assert!(format("format=json&x=1"));
        assert!(!format("format=api"));
    }
}
