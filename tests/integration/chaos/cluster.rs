//! Clusters that lose the primary of the store's slot, or move the slot.

use std::time::Duration;

use super::load::Kind;
use super::site::{Site, in_force};
use super::{now, report, rounds, slack};
use crate::redis_server::{RedisCluster, RedisServer, wait_until};
use crate::store_rig::Rig;

const PREFIX: &str = "chaos";

/// The nodes beside the one that the store is on, which belongs to the site.
struct Others {
    nodes: Vec<RedisServer>,
    /// Of the node that the store is on, if there should be one.
    replica: Option<RedisServer>,
    slot: String,
}

/// A cluster whose node with the store's slot is the server of the site.
fn start(with_replica: bool) -> (Site, Others) {
    let mut cluster = RedisCluster::start(&["--cluster-node-timeout", "800"]);
    let url = cluster.url();
    let owner = cluster.number_of_owner(&format!("{{{PREFIX}}}:meta"));
    let replica = with_replica.then(|| cluster.add_replica(owner));
    let slot: u64 = cluster.nodes[owner].run(&["CLUSTER", "KEYSLOT", PREFIX]);
    let primary = cluster.nodes.remove(owner);
    let site = Site::on(|| async {
        let mut rig = Rig::on_server(primary, &url);
        PREFIX.clone_into(&mut rig.config.prefix);
        rig
    });
    (site, Others { nodes: cluster.nodes, replica, slot: slot.to_string() })
}

fn id(node: &RedisServer) -> String {
    node.run(&["CLUSTER", "MYID"])
}

#[test]
#[ignore = "takes longer: make chaos"]
fn the_primary_of_the_stores_slot_killed() {
    let (mut site, others) = start(true);
    let replica = others.replica.as_ref().expect("it was asked for");
    let gate = site.gate();
    let doomed = site.caller(Kind::Revoked, "doomed");
    let load = site.load(&[&gate], [site.callers(), vec![doomed.clone()]].concat());
    site.redis_server().wait_for(replica);
    load.each_gate_answers(200, now());
    site.rig.server().kill();
    let killed = now();
    wait_until("the replica takes over", || {
        replica.run::<String>(&["INFO", "replication"]).contains("role:master")
    });
    let promoted = now();
    site.runtime.block_on(crate::harness::eventually("writes go on", || async {
        site.store.get((&doomed.principal).into()).await.ok().flatten()
    }));
    site.revoke(&doomed, in_force() + Duration::from_secs(1));
    load.each_gate_refuses(&doomed);
    let refused = now();
    site.in_step(&[&gate]);
    assert_eq!(site.full_loads(&gate), 1.0, "the replica has the same history");
    let seen = load.stop();
    let how_long = format!(
        "{}; failover in {} ms, a delete on the new primary in force {} ms after that",
        seen.noticed(),
        (promoted - killed).as_millis(),
        (refused - promoted).as_millis()
    );
    report("Primary of a Cluster killed", &seen, &how_long);
    seen.nobody_noticed();
}

#[test]
#[ignore = "takes longer: make chaos"]
fn the_stores_slot_moved() {
    let (site, others) = start(false);
    let gate = site.gate();
    let rounds = rounds(1, 6);
    let doomed: Vec<_> =
        (0..rounds).map(|i| site.caller(Kind::Revoked, &format!("doomed{i}"))).collect();
    let load = site.load(&[&gate], [site.callers(), doomed.clone()].concat());
    let here = site.redis_server();
    let there = &others.nodes[0];
    for (round, doomed) in doomed.iter().enumerate() {
        let (from, to) = if round % 2 == 0 { (here, there) } else { (there, here) };
        let slot = others.slot.as_str();
        to.run::<()>(&["CLUSTER", "SETSLOT", slot, "IMPORTING", &id(from)]);
        from.run::<()>(&["CLUSTER", "SETSLOT", slot, "MIGRATING", &id(to)]);
        let keys: Vec<String> = from.run(&["CLUSTER", "GETKEYSINSLOT", slot, "10000"]);
        for (i, key) in keys.iter().enumerate() {
            let port = to.port.to_string();
            from.run::<()>(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]);
            if i == keys.len() / 2 {
                // Half here, half there: long enough for the gate to look.
                load.each_gate_answers(200, now() + Duration::from_millis(600));
            }
        }
        for node in [to, from].into_iter().chain(&others.nodes[1..]) {
            node.run::<()>(&["CLUSTER", "SETSLOT", slot, "NODE", &id(to)]);
        }
        site.revoke(doomed, in_force() + slack());
        load.each_gate_refuses(doomed);
        site.in_step(&[&gate]);
    }
    assert_eq!(site.full_loads(&gate), 1.0, "the history moved along");
    let seen = load.stop();
    report("Slot of the store moved to another node of a Cluster", &seen, &seen.noticed());
    seen.nobody_noticed();
}
