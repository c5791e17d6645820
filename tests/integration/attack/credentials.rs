//! Credentials: exactly one reading, or none.

use super::rig::{Case, Expected, Rig, answers, get_with, passes, refused};

fn table() -> Vec<Case> {
    let mut table = vec![
        passes("one of each passes", get_with(""), &["alice GET /"]),
        passes(
            "the case of a header's name means nothing",
            "GET / HTTP/1.1\r\nHost: gate\r\nX-AUTH-NAME: alice\r\nx-auth-realm: shop\r\nx-Auth-toKen: {token}\r\n\r\n",
            &["alice GET /"],
        ),
        refused("a wrong token proves nothing", "GET / HTTP/1.1\r\nHost: gate\r\n{wrong}\r\n", 401),
        refused("no credentials prove nothing", "GET / HTTP/1.1\r\nHost: gate\r\n\r\n", 401),
        refused("the name twice, differing", get_with("X-Auth-Name: evil\r\n"), 400),
        refused("the name twice, the same", get_with("X-Auth-Name: alice\r\n"), 400),
        refused("the realm twice", get_with("X-Auth-Realm: shop\r\n"), 400),
        refused("the token twice", get_with("X-Auth-Token: {token}\r\n"), 400),
        refused("a second one that is empty", get_with("X-Auth-Name:\r\n"), 400),
        refused(
            "duplicates around the others",
            "GET / HTTP/1.1\r\nX-Auth-Name: evil\r\nHost: gate\r\n{alice}\r\n",
            400,
        ),
        refused("a folded name", claim("alice\r\n evil", "shop", "{token}"), 400),
        refused("a folded token", claim("alice", "shop", "\r\n {token}"), 400),
        answers(
            "space around a value is no part of it (RFC 9110 section 5.5)",
            claim("  \talice \t", "\tshop ", " {token} "),
            &[200],
            &["alice GET /"],
        ),
    ];
    table.extend(
        [
            "X_Auth_Name",
            "x_auth_name",
            "X.Auth.Name",
            "X-Auth_Name",
            "x_auth-name",
            "X!Auth!Name",
            "X#Auth#Name",
            "X$Auth$Name",
            "X%Auth%Name",
            "X&Auth&Name",
            "X'Auth'Name",
            "X*Auth*Name",
            "X+Auth+Name",
            "X^Auth^Name",
            "X`Auth`Name",
            "X|Auth|Name",
            "X~Auth~Name",
            "X_AUTH_REALM",
            "x.auth.realm",
            "X_Auth_Token",
            "X.AUTH.TOKEN",
            "x-auth.token",
        ]
        .map(|alias| refused(alias, get_with(&format!("{alias}: evil\r\n")), 400)),
    );
    table.extend(
        [
            ("an empty name", ""),
            ("a list for a name is one name, which nobody has", "alice, bob"),
            ("quotes are part of a name", "\"alice\""),
            ("a name in another case", "Alice"),
            ("a name with a tab in it", "al\tice"),
            ("a name beside a no-break space", "alice\u{a0}"),
            ("a name beside an ideographic space", "\u{3000}alice"),
            ("a name with a zero-width space", "ali\u{200b}ce"),
            ("a name with a right-to-left override", "ali\u{202e}ce"),
            ("a name with a C1 control", "alice\u{85}"),
            ("a name in other letters that look the same", "\u{430}lice"),
            ("a name in full width", "\u{ff41}lice"),
            ("a name with a combining character", "alice\u{301}"),
            ("a percent-encoded name", "%61lice"),
            ("an encoded word (RFC 2047)", "=?utf-8?q?alice?="),
            ("a name with its realm", "alice@shop"),
        ]
        .map(|(says, name)| unproven(says, claim(name, "shop", "{token}"))),
    );
    table.extend(
        [
            ("an empty realm", ""),
            ("a realm in another case", "SHOP"),
            ("a realm with a slash", "shop/"),
            ("the realm of somebody else", "lab"),
        ]
        .map(|(says, realm)| unproven(says, claim("alice", realm, "{token}"))),
    );
    table.extend(
        [
            ("an empty token", ""),
            ("a token with a sign", "+{token}"),
            ("a token with a minus", "-{token}"),
            ("a token with zeros in front", "0{token}"),
            ("a token with a space in it", "{token} 1"),
            ("a list of tokens", "{token}, {token}"),
            ("a token beside a no-break space", "{token}\u{a0}"),
            ("a token in full-width digits", "\u{ff11}\u{ff12}\u{ff13}\u{ff14}\u{ff15}\u{ff16}"),
            ("a token in Arabic digits", "\u{661}\u{662}\u{663}\u{664}\u{665}\u{666}"),
            ("a token in quotes", "\"{token}\""),
            ("a token as a hexadecimal number", "0x{token}"),
            ("a token with a fraction", "{token}.0"),
            ("a token with an exponent", "{token}e0"),
            ("a token with parameters", "{token};q=1"),
            ("a token that is true", "true"),
        ]
        .map(|(says, token)| unproven(says, claim("alice", "shop", token))),
    );
    for size in [129, 4096, 20_000] {
        table.push(refused("an oversized name", claim(&"n".repeat(size), "shop", "{token}"), 400));
        table.push(refused(
            "an oversized realm",
            claim("alice", &"r".repeat(size), "{token}"),
            400,
        ));
        table.push(refused("an oversized token", claim("alice", "shop", &"1".repeat(size)), 401));
    }
    for bytes in [&b"\xff"[..], b"ali\xc3", b"\xc0\xafalice", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"]
    {
        let sends = |name: &[u8], token: &[u8]| {
            [
                b"GET / HTTP/1.1\r\nHost: gate\r\nX-Auth-Realm: shop\r\nX-Auth-Name: ",
                name,
                b"\r\nX-Auth-Token: ",
                token,
                b"\r\n\r\n",
            ]
            .concat()
        };
        table.push(refused("a name that is not UTF-8", sends(bytes, b"{token}"), 400));
        table.push(refused("a token that is not UTF-8", sends(b"alice", bytes), 401));
    }
    table
}

/// A `GET` with this claim.
fn claim(name: &str, realm: &str, token: &str) -> String {
    format!(
        "GET / HTTP/1.1\r\nHost: gate\r\nX-Auth-Name: {name}\r\nX-Auth-Realm: {realm}\r\nX-Auth-Token: {token}\r\n\r\n"
    )
}

/// It is refused, as unclear or as unproven: which one is for `proxy/credentials.rs` to test.
fn unproven(says: &'static str, sends: String) -> Case {
    Case { says, sends: sends.into_bytes(), expected: Expected::Refused }
}

#[tokio::test]
async fn credentials_have_one_reading() {
    Rig::normal().await.run(&table()).await;
}

/// In report mode what would be refused is forwarded, as nobody's.
#[tokio::test]
async fn reported_requests_bear_no_identity() {
    let rig = Rig::reporting().await;
    rig.run_checking(&table(), |case, got, seen| match case.expected {
        Expected::Done([200], [_]) => seen.iter().all(|seen| seen.who() == "alice") && got == [200],
        // Heads that cannot be read are refused in every mode.
        _ if got == [400] => seen.is_empty() && case.sends.windows(3).any(|w| w == b"\r\n "),
        _ => got == [200] && seen.len() == 1 && seen[0].who() == "nobody",
    })
    .await;
}

/// Of all families: what needs a proof goes nowhere, what is unclear is refused as ever.
#[tokio::test]
async fn without_the_store_nothing_passes() {
    use super::{framing, identity, targets};
    let rig = Rig::without_store().await;
    let families = [table(), identity::table(), framing::table(), targets::table()];
    rig.run_checking(&families.concat(), |case, got, seen| {
        let open = |line: &str| line.contains(" /public") || line.contains(" /watched");
        let forwarded = got.iter().filter(|status| **status == 200).count();
        seen.iter().all(|seen| open(seen.line()) && seen.who() == "nobody" && seen.whole)
            && got.iter().all(|status| [200, 400, 401, 405, 413, 431, 503].contains(status))
            && forwarded == seen.len()
            && (!case.is_unclear() || seen.is_empty())
    })
    .await;
}
