//! The seeds of the agent's fuzz target as a test.

#[path = "../../fuzz/src/agent.rs"]
mod agent;
#[path = "../../fuzz/src/input.rs"]
mod input;
#[path = "../../fuzz/src/seeds.rs"]
mod seeds;

#[test]
fn agent_replies() {
    seeds::replay("agent", agent::agent);
}
