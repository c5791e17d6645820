//! What `OPTIONS` tells of a resource.

use axum::response::Response;
use http::StatusCode;
use http::header::{ALLOW, HeaderValue};
use serde_json::{Value, json};

use super::Resource;
use super::error::json_response;
use super::negotiate::media_type;
use crate::entry::{MAX_CHARS, MAX_OVERLAP_SECONDS};

/// Describes a resource as Django REST framework does.
pub(super) fn describe(resource: Resource) -> Response {
    let (name, actions) = match resource {
        Resource::Root => ("Api Root", None),
        Resource::Entries => ("Otp List", Some(json!({ "POST": entry_fields() }))),
        Resource::Entry => ("Otp Instance", Some(json!({ "PUT": entry_fields() }))),
        Resource::Rotate => (
            "Rotate",
            Some(json!({ "POST": {
                "overlap": {
                    "type": "integer", "required": false, "read_only": false, "label": "Overlap",
                    "min_value": 0, "max_value": MAX_OVERLAP_SECONDS,
                },
                "keep": {
                    "type": "choice", "required": false, "read_only": false, "label": "Keep",
                    "choices": [
                        { "value": "current", "display_name": "current" },
                        { "value": "previous", "display_name": "previous" },
                    ],
                },
            }})),
        ),
        Resource::Uri => ("Uri", None),
        Resource::Qr => ("Qr", None),
        Resource::Verify => (
            "Verify",
            Some(json!({ "POST": {
                "name": text("Name"), "realm": text("Realm"), "token": text("Token"),
            }})),
        ),
    };
    let mut body = json!({
        "name": name,
        "description": "",
        "renders": [media_type(resource)],
        "parses": [
            "application/json", "application/x-www-form-urlencoded", "multipart/form-data",
        ],
    });
    if let Some(actions) = actions {
        body["actions"] = actions;
    }
    let mut response = json_response(StatusCode::OK, &body);
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(resource.allow()));
    response
}

fn entry_fields() -> Value {
    json!({
        "name": text("Name"),
        "realm": text("Realm"),
        "seed": { "type": "string", "required": false, "read_only": true, "label": "Seed" },
    })
}

fn text(label: &str) -> Value {
    json!({
        "type": "string",
        "required": true,
        "read_only": false,
        "label": label,
        "max_length": MAX_CHARS,
    })
}
