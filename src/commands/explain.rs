//! `otpgate explain`: which route of the configuration governs a request, and what follows from it.

use std::process::ExitCode;

use clap::Args;
use http::{Method, Uri};
use serde_json::{Value, json};

use super::look::Look;
use crate::cli::{Failure, Settings, Usage};
use crate::config::Config;
use crate::entry::Principal;
use crate::otp::Reuse;
use crate::policy::{Access, Authority, Governing, Grant, Mode, Route};

/// Arguments of `otpgate explain`.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    #[command(flatten)]
    settings: Settings,
    /// The request's method
    method: Method,
    /// Its URL, as `http://shop.example/admin/`, or its path
    url: String,
    /// Who sends it, as name@realm [default: somebody without credentials]
    #[arg(long = "as", value_name = "PRINCIPAL", value_parser = principal)]
    who: Option<Principal>,
    /// For machines: {"outcome", "status", "reason", "route", "path"}
    #[arg(long)]
    json: bool,
}

fn principal(text: &str) -> Result<Principal, String> {
    let (name, realm) = text.rsplit_once('@').ok_or("is not name@realm")?;
    Principal::parse(name, realm).map_err(|e| e.to_string())
}

/// What happens to the request.
struct Explained {
    /// `None`: it is forwarded.
    status: Option<u16>,
    reason: String,
    /// Its number in the configuration, where there are routes.
    route: Option<usize>,
    /// The path that decided, and that is forwarded.
    path: Option<String>,
    reports: bool,
}

/// Prints what the gate would do. Exit code 0 if it would forward the request, 1 if not.
///
/// # Errors
/// If the configuration, the method or the URL cannot be used.
pub fn run(args: &ExplainArgs) -> Result<ExitCode, Failure> {
    let config = args.settings.load()?;
    let uri: Uri = args.url.parse().map_err(|e| Usage(format!("the URL: {e}")))?;
    let explained = explain(&config, args.method.as_str(), &uri, args.who.as_ref())?;
    super::print(&if args.json {
        json_of(&explained)
    } else {
        text_of(&explained, Look::of_stdout())
    })?;
    let passes = explained.status.is_none() || explained.reports;
    Ok(if passes { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn explain(
    config: &Config,
    method: &str,
    uri: &Uri,
    who: Option<&Principal>,
) -> Result<Explained, Usage> {
    let policy = config.policy();
    let host = match uri.authority() {
        None => String::new(),
        Some(authority) => Authority::parse(authority.as_str())
            .map(|authority| authority.host().to_owned())
            .ok_or_else(|| Usage(format!("`{authority}` is no host")))?,
    };
    let refused = |status, reason: String| Explained {
        status: Some(status),
        reason,
        route: None,
        path: None,
        reports: false,
    };
    let path = match policy.read(method, &host, uri.path()) {
        Ok(path) => path,
        Err(error) => return Ok(refused(400, format!("the path {error}"))),
    };
    let forwarded = Some(path.forwarded().to_owned());
    let route = match policy.govern(method, &host, &path) {
        Governing::Ambiguous => {
            let reason = "servers read the path in ways that different routes govern";
            return Ok(Explained { path: forwarded, ..refused(400, reason.to_owned()) });
        }
        Governing::Nothing => None,
        Governing::Route(route) => Some(route),
    };
    let number = route.and_then(|route| config.routes.iter().position(|r| r == route));
    let (status, reason) = judge(route, who);
    Ok(Explained {
        status,
        reason,
        route: number,
        path: forwarded,
        reports: policy.mode_of(route) == Mode::Report,
    })
}

fn judge(route: Option<&Route>, who: Option<&Principal>) -> (Option<u16>, String) {
    match (route, who) {
        (Some(route), _) if route.is_public() => (None, "the route is public".to_owned()),
        (_, None) => (Some(401), "credentials are missing".to_owned()),
        (None, Some(_)) => (Some(403), "no route covers it".to_owned()),
        (Some(route), Some(who)) => {
            let allowed = allowed(route);
            match route.permits(who) {
                true => (None, format!("`allow` has {allowed}{}", uses(route))),
                false => (Some(403), format!("`allow` has only {allowed}")),
            }
        }
    }
}

fn allowed(route: &Route) -> String {
    let Access::Allow(grants) = &route.access else { return String::new() };
    let grant = |grant: &Grant| match grant {
        Grant::Anybody => "*".to_owned(),
        Grant::Realm(realm) => realm.to_string(),
        Grant::Principal(who) => who.to_string(),
    };
    grants.iter().map(grant).collect::<Vec<_>>().join(", ")
}

fn uses(route: &Route) -> String {
    match route.reuse {
        Some(Reuse::Times(times)) => format!("; its token may be used {times} times"),
        Some(Reuse::Window) | None => String::new(),
    }
}

fn outcome(explained: &Explained) -> &'static str {
    match explained {
        Explained { status: None, .. } => "forwarded",
        Explained { reports: true, status: Some(401 | 403), .. } => "reported",
        _ => "refused",
    }
}

fn json_of(explained: &Explained) -> String {
    let Explained { status, reason, route, path, .. } = explained;
    let route = route.map_or(Value::Null, |number| json!(format!("route[{number}]")));
    let outcome = outcome(explained);
    json!({ "outcome": outcome, "status": status, "reason": reason, "route": route, "path": path })
        .to_string()
}

fn text_of(explained: &Explained, look: Look) -> String {
    let Explained { status, reason, route, path, .. } = explained;
    let what = match (outcome(explained), status) {
        ("reported", Some(status)) => {
            format!(
                "forwarded without identity, and reported: `enforce` would refuse it with {status}"
            )
        }
        (outcome, None) => outcome.to_owned(),
        (outcome, Some(status)) => format!("{outcome} with {status}"),
    };
    let verdict = if status.is_none() { look.good } else { look.bad };
    let mut text = format!("{verdict}{what}{verdict:#}");
    let heading = look.heading;
    let mut line = |name, value: &str| {
        text.push_str(&format!("\n{heading}{name:<7}{heading:#}{value}"));
    };
    line("why", reason);
    match route {
        Some(number) => line("route", &format!("route[{number}], counted from 0")),
        None => line("route", "none of the configuration's"),
    }
    if let Some(path) = path {
        line("path", &crate::client::printable(path));
    }
    text
}
