//! Content negotiation: the API speaks JSON alone, but for QR codes, which are images.

use http::header::ACCEPT;
use http::{Method, request};

use super::Resource;
use super::error::ApiError;

/// The type of what a resource shows; refusals and descriptions are JSON.
pub(super) const fn media_type(resource: Resource) -> &'static str {
    if matches!(resource, Resource::Qr) { "image/svg+xml" } else { "application/json" }
}

/// Refuses callers that do not take what there is.
///
/// # Errors
/// If `?format=` or `Accept` excludes it.
pub(super) fn negotiate(head: &request::Parts, resource: Resource) -> Result<(), ApiError> {
    let described = head.method == Method::OPTIONS;
    let media = media_type(if described { Resource::Root } else { resource });
    let format = if media == media_type(Resource::Qr) { "svg" } else { "json" };
    let query = head.uri.query().unwrap_or_default();
    if form_urlencoded::parse(query.as_bytes()).any(|(k, v)| k == "format" && v != format) {
        return Err(ApiError::NotFound);
    }
    let mut given = head.headers.get_all(ACCEPT).iter().peekable();
    if given.peek().is_none() {
        return Ok(());
    }
    let is_taken = given
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|range| takes(range, media));
    if is_taken { Ok(()) } else { Err(ApiError::NotAcceptable) }
}

/// Whether one range of `Accept` covers a media type.
fn takes(range: &str, media: &str) -> bool {
    let mut parts = range.split(';').map(|part| part.trim().to_ascii_lowercase());
    let kind = media.split('/').next().unwrap_or_default();
    let matches = parts.next().is_some_and(|range| {
        range == "*/*" || range == media || range.strip_suffix("/*") == Some(kind)
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
    fn each_resource_has_its_type() {
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
            let head = request.into_parts().0;
            assert_eq!(negotiate(&head, Resource::Entry).is_ok(), taken, "{accept}");
        }
        for (accept, taken) in
            [("image/svg+xml", true), ("image/*", true), ("*/*", true), ("application/json", false)]
        {
            let mut request = http::Request::get("/").header(ACCEPT, accept).body(()).unwrap();
            assert_eq!(negotiate(&request.clone().into_parts().0, Resource::Qr).is_ok(), taken);
            *request.method_mut() = Method::OPTIONS;
            let described = negotiate(&request.into_parts().0, Resource::Qr).is_ok();
            assert_eq!(described, matches!(accept, "*/*" | "application/json"), "{accept}");
        }
        let format = |query: &str| {
            let request = http::Request::get(format!("/?{query}")).body(()).unwrap();
            let head = request.into_parts().0;
            [Resource::Root, Resource::Qr].map(|resource| negotiate(&head, resource).is_ok())
        };
        assert_eq!(format("format=json&x=1"), [true, false]);
        assert_eq!(format("format=svg"), [false, true]);
        assert_eq!(format("format=api"), [false, false]);
    }
}
