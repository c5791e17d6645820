//! `otpgate client`: manages and verifies entries through a server's API.
//!
//! Takes the flags and environment variables of ungleichotpclient, so that its users' scripts go on.

use std::io::{BufWriter, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::ValueEnum as _;
use serde_json::{Map, json};

use super::look::{Look, has_colours};
use crate::client::{self, Client, ClientError, ClientTls, Credentials, Filter, TokenSource};
use crate::clock::{Clock, SystemClock};
use crate::entry::{Name, Realm, Seed};
use crate::otp::{Generator, TokenParams};
use crate::secret::Secret;

mod args;
mod qr;
mod show;

pub use args::ClientArgs;
use args::{ClientCommand, ServerArgs, Which};
use show::{Lines, one, to_json};

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The command line or the environment.
    #[error("{0}")]
    Usage(String),
    /// The call.
    #[error("{0}{advice}", advice = advice(.0))]
    Call(#[from] ClientError),
    /// No such entry.
    #[error("there is no entry of that name in that realm")]
    NoEntry,
    /// The result cannot be printed.
    #[error("{0}")]
    Output(String),
}

/// What to look at.
fn advice(error: &ClientError) -> &'static str {
    match error {
        ClientError::Unreachable(_) => {
            "; is it running, and is its `api.listen` at `--server-url`?"
        }
        ClientError::Refused { status, detail, .. }
            if *status == 403 && detail.starts_with("Incorrect") =>
        {
            " Look at `--auth-name`, `--auth-realm`, the seed, and this machine's clock."
        }
        _ => "",
    }
}

impl CommandError {
    /// 1: refused or failed; 2: usage.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) | Self::Call(ClientError::Setup(_)) => ExitCode::from(2),
            Self::Call(_) | Self::NoEntry | Self::Output(_) => ExitCode::from(1),
        }
    }
}

/// Runs the command and prints its result.
///
/// # Errors
/// Nothing was printed then, but for the beginning of a list that broke off; the caller prints the error
/// and ends with its exit code.
pub async fn run(args: ClientArgs) -> Result<ExitCode, CommandError> {
    let environment = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let json = args.server.json;
    warn_of_arguments(&args);
    let look = Look::of_stdout();
    let client = connect(args.server, &environment, clock.clone())?;
    let text = match args.command {
        ClientCommand::Create { name, realm, fields, qr } => {
            qr::check_terminal(qr)?;
            let mut fields = fields.into_json();
            fields.insert("name".into(), json!(name));
            fields.insert("realm".into(), json!(realm));
            let made = client.create(fields).await?;
            one(&made, json, look) + &qr::below(&made, qr)
        }
        ClientCommand::List { name, realm, seeds } => {
            let name = name.map(|name| parse_name(&name)).transpose()?;
            let realm = realm.map(|realm| parse_realm(&realm)).transpose()?;
            list(&client, &Filter { name, realm }, (!json).then_some((seeds, look))).await?;
            return Ok(ExitCode::SUCCESS);
        }
        ClientCommand::Show { which } => {
            let id = find(&client, which).await?;
            one(&client.show(id).await?, json, look)
        }
        ClientCommand::Update { which, new_name, new_realm, fields } => {
            let mut fields = fields.into_json();
            fields.extend(new_name.map(|name| ("name".to_owned(), json!(name))));
            fields.extend(new_realm.map(|realm| ("realm".to_owned(), json!(realm))));
            if fields.is_empty() {
                return Err(CommandError::Usage("nothing to change is given".into()));
            }
            let id = find(&client, which).await?;
            one(&client.update(id, fields).await?, json, look)
        }
        ClientCommand::Rotate { which, overlap, keep, qr } => {
            qr::check_terminal(qr)?;
            let mut fields = Map::new();
            fields.extend(overlap.map(|time| ("overlap".to_owned(), json!(time.as_secs()))));
            let keep = keep.and_then(|keep| Some(keep.to_possible_value()?.get_name().to_owned()));
            fields.extend(keep.map(|keep| ("keep".to_owned(), json!(keep))));
            let id = find(&client, which).await?;
            let rotated = client.rotate(id, fields).await?;
            one(&rotated, json, look) + &qr::below(&rotated, qr)
        }
        ClientCommand::Uri { which } => {
            let id = find(&client, which).await?;
            let uri = qr::uri(&client.show(id).await?)?;
            if json { to_json(&json!({ "uri": *uri })) } else { format!("{}\n", *uri) }
        }
        ClientCommand::Qr { which, svg } => {
            qr::check_terminal(svg.is_none())?;
            let id = find(&client, which).await?;
            let code = qr::code(&client.show(id).await?)?;
            match svg {
                None => code.blocks(has_colours()).to_string(),
                Some(path) => {
                    qr::write(&code, &path)?;
                    let shown = path.display().to_string();
                    if json { to_json(&json!({ "svg": shown })) } else { format!("{shown}\n") }
                }
            }
        }
        ClientCommand::Delete { which } => {
            let id = find(&client, which).await?;
            client.delete(id).await?;
            if json { to_json(&json!({ "deleted": id })) } else { format!("deleted {id}\n") }
        }
        ClientCommand::Verify { name, realm, token, seed, seed_file } => {
            let token = match (token, read_seed(seed, seed_file.as_deref())?) {
                (Some(token), _) => token,
                (None, Some(seed)) => Secret::new(
                    Generator::new(&seed, TokenParams::default()).token_at(clock.now().unix),
                ),
                (None, None) => ask("Token to verify: ", "--token")?,
            };
            client.verify(&name, &realm, token.expose(), None).await?;
            if json { to_json(&json!({ "status": "OK" })) } else { "OK\n".to_owned() }
        }
    };
    super::print(text.trim_end_matches('\n')).map_err(|e| CommandError::Output(e.to_string()))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints entries while they arrive: as a table, with seeds or without, or as JSON.
async fn list(
    client: &Client,
    filter: &Filter,
    table: Option<(bool, Look)>,
) -> Result<(), CommandError> {
    let failed = |e| CommandError::Output(format!("cannot write the result: {e}"));
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut lines = match table {
        Some((seeds, look)) => Lines::table(seeds, look),
        None => Lines::json(),
    };
    client.each(filter, |entry| lines.add(entry, &mut out).map_err(failed)).await?;
    lines.end(&mut out).and_then(|()| out.flush()).map_err(failed)
}

/// Arguments cannot be hidden from other users once the program runs.
fn warn_of_arguments(args: &ClientArgs) {
    let verified = match &args.command {
        ClientCommand::Verify { seed, .. } => seed.as_ref().map(|_| "--seed"),
        _ => None,
    };
    for flag in args.server.auth_seed.as_ref().map(|_| "--auth-seed").into_iter().chain(verified) {
        super::note(format_args!(
            "otpgate: a seed in `{flag}` shows in the list of processes: better `{flag}-file` or a variable"
        ));
    }
}

type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

fn connect(
    args: ServerArgs,
    environment: Environment<'_>,
    clock: Arc<dyn Clock>,
) -> Result<Client, CommandError> {
    let first = |flag: Option<String>, names: [&str; 2]| {
        flag.or_else(|| names.into_iter().find_map(environment)).ok_or_else(|| {
            let flag = names[0].trim_start_matches("OTPGATE_").replace('_', "-").to_lowercase();
            CommandError::Usage(format!("missing `--{flag}` (or {})", names.join(", ")))
        })
    };
    let url = first(args.server_url.clone(), ["OTPGATE_SERVER_URL", "UNGLEICHOTPSERVER"])?;
    let name = first(args.auth_name.clone(), ["OTPGATE_AUTH_NAME", "UNGLEICHOTPNAME"])?;
    let realm = first(args.auth_realm.clone(), ["OTPGATE_AUTH_REALM", "UNGLEICHOTPREALM"])?;
    let (name, realm) = (parse_name(&name)?, parse_realm(&realm)?);
    let credentials = match proof(&args, environment)? {
        Proof::Seed(seed) => TokenSource::new(name, realm, seed).with_clock(clock).into(),
        Proof::Token(token) => Credentials::Token { name, realm, token },
    };
    let identity = args.cert_file.zip(args.key_file);
    let tls = ClientTls { ca_file: args.ca_file, identity };
    Ok(Client::new(&url, credentials, &tls)?)
}

/// What proves the caller.
enum Proof {
    Seed(Seed),
    Token(Secret),
}

/// Flags beat the environment, OTPGATE_* beats ungleichotpclient's; then the terminal is asked.
fn proof(args: &ServerArgs, environment: Environment<'_>) -> Result<Proof, CommandError> {
    if let Some(token) = &args.auth_token {
        return Ok(Proof::Token(token.clone()));
    }
    if let Some(seed) = read_seed(args.auth_seed.clone(), args.auth_seed_file.as_deref())? {
        return Ok(Proof::Seed(seed));
    }
    if let Some(token) = environment("OTPGATE_AUTH_TOKEN") {
        return Ok(Proof::Token(Secret::new(token)));
    }
    let file = environment("OTPGATE_AUTH_SEED_FILE").map(PathBuf::from);
    let seed = environment("OTPGATE_AUTH_SEED").map(Secret::new);
    if seed.is_some() && file.is_some() {
        let text = "both OTPGATE_AUTH_SEED and OTPGATE_AUTH_SEED_FILE are set";
        return Err(CommandError::Usage(text.into()));
    }
    if let Some(seed) = read_seed(seed, file.as_deref())? {
        return Ok(Proof::Seed(seed));
    }
    let seed = match environment("UNGLEICHOTPSEED") {
        Some(seed) => Secret::new(seed),
        None => ask("Seed of the caller: ", "--auth-seed-file")?,
    };
    parse_seed(&seed).map(Proof::Seed)
}

fn read_seed(seed: Option<Secret>, file: Option<&Path>) -> Result<Option<Seed>, CommandError> {
    let seed = match (seed, file) {
        (Some(seed), _) => seed,
        (None, Some(path)) => {
            let seed = client::read_seed(path);
            return seed.map(Some).map_err(|e| CommandError::Usage(e.to_string()));
        }
        (None, None) => return Ok(None),
    };
    parse_seed(&seed).map(Some)
}

fn parse_seed(seed: &Secret) -> Result<Seed, CommandError> {
    Seed::parse(seed.expose()).map_err(|e| CommandError::Usage(format!("the seed {e}")))
}

fn parse_name(name: &str) -> Result<Name, CommandError> {
    Name::parse(name).map_err(|e| CommandError::Usage(format!("the name {e}")))
}

fn parse_realm(realm: &str) -> Result<Realm, CommandError> {
    Realm::parse(realm).map_err(|e| CommandError::Usage(format!("the realm {e}")))
}

/// Asks on the terminal without echo.
fn ask(question: &str, flag: &str) -> Result<Secret, CommandError> {
    if !std::io::stdin().is_terminal() {
        return Err(CommandError::Usage(format!("missing `{flag}`, and no terminal to ask on")));
    }
    rpassword::prompt_password(question)
        .map(Secret::new)
        .map_err(|e| CommandError::Usage(format!("cannot ask on the terminal: {e}")))
}

async fn find(client: &Client, which: Which) -> Result<u64, CommandError> {
    let (name, realm) = match (which.id, which.name, which.realm) {
        (Some(id), _, _) => return Ok(id),
        (None, Some(name), Some(realm)) => (parse_name(&name)?, parse_realm(&realm)?),
        _ => return Err(CommandError::Usage("give `--id`, or `--name` and `--realm`".into())),
    };
    let filter = Filter { name: Some(name), realm: Some(realm) };
    let found = client.list(&filter).await?.into_iter().next().ok_or(CommandError::NoEntry)?;
    found.id.ok_or_else(|| {
        let text = "the server shows no numbers of entries: give `--id`";
        ClientError::BadAnswer(text.into()).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        client: ClientArgs,
    }

    fn parse(args: &[&str]) -> Result<ClientArgs, clap::Error> {
        let args = std::iter::once("client").chain(args.iter().copied());
        Cli::try_parse_from(args).map(|cli| cli.client)
    }

    fn connect_with(args: &[&str], environment: &[(&str, &str)]) -> Result<String, String> {
        let environment = |name: &str| {
            environment.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        };
        let args = parse(args).map_err(|e| e.to_string())?;
        connect(args.server, &environment, Arc::new(ManualClock::at(0)))
            .map(|client| format!("{client:?}"))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
        for good in [
            &["--server-url", "http://a", "verify", "--name", "a", "--realm", "b"] as &[_],
            &["verify", "--name", "a", "--realm", "b", "--token", "123456", "--auth-seed", "AA"],
            &["delete", "--id", "1", "--json"],
            &["show", "--name", "a", "--realm", "b"],
        ] {
            assert!(parse(good).is_ok(), "{good:?}");
        }
        for bad in [
            &["delete"] as &[_],
            &["delete", "--name", "a"],
            &["delete", "--id", "1", "--name", "a", "--realm", "b"],
            &["list", "--auth-seed", "AA", "--auth-token", "123456"],
            &["verify", "--name", "a", "--realm", "b", "--token", "1", "--seed", "AA"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_environment_of_ungleichotpclient_works() {
        let theirs = [
            ("UNGLEICHOTPSERVER", "http://127.0.0.1:1/ungleichotp/verify/"),
            ("UNGLEICHOTPNAME", "info@ungleich.ch"),
            ("UNGLEICHOTPREALM", "ungleich-admin"),
            ("UNGLEICHOTPSEED", "PZKBPTHDGSLZBKIZ"),
        ];
        let client = connect_with(&["list"], &theirs).unwrap();
        assert!(client.contains("http://127.0.0.1:1/\""), "{client}");
        assert!(client.contains("info@ungleich.ch") && client.contains("Source("), "{client}");
        assert!(!client.contains("PZKB"), "{client}");
        // flags beat OTPGATE_*, which beats theirs
        let mut all = vec![("OTPGATE_AUTH_NAME", "ours"), ("OTPGATE_AUTH_TOKEN", "123456")];
        all.extend(theirs);
        let client = connect_with(&["list"], &all).unwrap();
        assert!(client.contains("\"ours\"") && client.contains("Token {"), "{client}");
        let client =
            connect_with(&["list", "--auth-name", "flag", "--auth-seed", "AAAA"], &all).unwrap();
        assert!(client.contains("\"flag\"") && client.contains("Source("), "{client}");
        let missing = connect_with(&["list"], &theirs[1..]).unwrap_err();
        assert!(missing.contains("--server-url") && missing.contains("UNGLEICHOTPSERVER"));
        let bad = connect_with(&["list", "--auth-seed", "1!"], &theirs).unwrap_err();
        assert_eq!(bad, "the seed is not base32");
    }
}
