//! What stays in the memory of a gate.

use std::io::{Read as _, Seek as _, SeekFrom};

use otpgate::entry::Seed;
use serde_json::json;

use crate::harness::{
    ADMIN, ALICE, BOB, Gate, Sandbox, VERIFIER, eventually, http, token, wrong_token,
};

/// How often `needle` stands in the writable memory of a gate.
fn count(gate: &Gate, needle: &[u8]) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", gate.pid())).unwrap();
    let mut memory = std::fs::File::open(format!("/proc/{}/mem", gate.pid())).unwrap();
    let mut found = 0;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (range, mode) = (words.next().unwrap(), words.next().unwrap());
        if !mode.starts_with("rw") {
            continue;
        }
        let (from, to) = range.split_once('-').unwrap();
        let [from, to] = [from, to].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        let mut region = vec![0; usize::try_from(to - from).unwrap()];
        memory.seek(SeekFrom::Start(from)).unwrap();
        // Parts that are gone by now, or that the kernel keeps to itself.
        if memory.read_exact(&mut region).is_ok() {
            found += occurrences(&region, needle);
        }
    }
    found
}

/// The allocator reserves much that is never written: only what is not all zero is looked at closely.
fn occurrences(region: &[u8], needle: &[u8]) -> usize {
    const PART: usize = 64 << 10;
    let zeros = [0; PART];
    let parts = (0..region.len()).step_by(PART).filter(|at| {
        let part = &region[*at..region.len().min(at + PART)];
        part != &zeros[..part.len()]
    });
    let starts = parts.flat_map(|at| at..region.len().min(at + PART));
    starts.filter(|at| region[*at] == needle[0] && region[*at..].starts_with(needle)).count()
}

/// What tokens of a seed are computed from: the state of SHA-1 behind the block of HMAC's inner key (RFC 2104).
fn keyed(seed: &str) -> Vec<u8> {
    let mut block = [0x36; 64];
    for (byte, key) in block.iter_mut().zip(Seed::parse(seed).unwrap().bytes().iter()) {
        *byte ^= key;
    }
    let mut state = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    sha1::block_api::compress(&mut state, &[block]);
    state.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// An entry that no answer has shown leaves nothing behind when it is deleted; and while it is there, its
/// seed is not in memory, and what tokens are computed from is so once.
#[tokio::test]
async fn the_seed_of_a_deleted_entry_is_gone() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("[process]\ncore_dumps = true\n").ready().await;
    for token in [token(ALICE), wrong_token(ALICE), "12".into()] {
        let _ = gate.call("/", "alice", "shop", &token).send().await.unwrap();
        let verify = json!({
            "auth_name": "verifier", "auth_realm": "ungleich-auth",
            "auth_token": crate::harness::token(VERIFIER),
            "name": "alice", "realm": "shop", "token": token,
        });
        let _ = http().post(format!("{}/verify", gate.api)).json(&verify).send().await.unwrap();
    }
    let seed = Seed::parse(ALICE).unwrap().bytes();
    let seeds = || count(&gate, ALICE.as_bytes()) + count(&gate, &seed);
    let [alice, bob] = [ALICE, BOB].map(keyed);
    assert_eq!((seeds(), count(&gate, &alice)), (0, 1));

    let delete = json!({
        "auth_name": "admin", "auth_realm": "ungleich-admin", "auth_token": token(ADMIN),
    });
    let url = format!("{}/ungleichotp/3/", gate.api);
    assert_eq!(http().delete(url).json(&delete).send().await.unwrap().status(), 204);
    // A reader that was looking at the entry lets go of it within its request.
    eventually("the seed is gone", || async { (count(&gate, &alice) == 0).then_some(()) }).await;
    assert_eq!((seeds(), count(&gate, &bob)), (0, 1), "only that one");
}
