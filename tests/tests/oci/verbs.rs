//! What the verbs answer: documents for engines and texts for people.

use super::PATIENT;
use coffer_tests::bundle::Bundle;
use coffer_tests::oci::Runtime;
use coffer_tests::{Test, finish_with_input, schema, wait_for};
use serde_json::{Value, json};
use std::fs;

#[test]
fn state_and_features_are_as_the_schemas_say() {
    let test = Test::new("schemas");
    let mut bundle = Bundle::new(&test, PATIENT);
    bundle.config["annotations"] = json!({"org.example.key": "value"});
    for runtime in Runtime::all(&test) {
        let features = runtime.call(&["features"]);
        // CRI-O reads both streams as one.
        assert_eq!(features.stderr, "", "{}", runtime.name());
        let features: Value = serde_json::from_slice(&features.stdout).unwrap();
        // runc of Debian 13 lists architectures of a later specification than the schemas'.
        if runtime.is_coffer() {
            schema::check("features-schema.json", &features).unwrap();
        }
        assert!(
            features["linux"]["namespaces"]
                .as_array()
                .is_some_and(|n| n.len() >= 6),
            "{features}"
        );

        let version = runtime.ok(&["--version"]);
        assert!(
            version.starts_with(&format!("{} version ", runtime.name())),
            "{version}"
        );
        assert!(
            version.lines().any(|l| l.starts_with("commit: ")),
            "{version}"
        );
        assert!(
            version.lines().any(|l| l.starts_with("spec: ")),
            "{version}"
        );

        let container = runtime.create(bundle.write(), &[]);
        let id = container.id.as_str();
        let shape = |status: &str| {
            let state = runtime.state(id);
            if status != "paused" {
                schema::check("state-schema.json", &state).unwrap();
            }
            assert_eq!(state["status"], status, "{}", runtime.name());
            assert_eq!(state["id"], id);
            assert_eq!(state["bundle"], bundle.dir.to_str().unwrap());
            assert_eq!(state["annotations"]["org.example.key"], "value");
            let listed = runtime.ok(&["list", "--format", "json"]);
            let listed: Value = serde_json::from_str(&listed).unwrap();
            let entry = &listed.as_array().unwrap()[0];
            for field in [
                "ociVersion",
                "id",
                "pid",
                "status",
                "bundle",
                "rootfs",
                "created",
            ] {
                assert_eq!(entry[field], state[field], "{} {field}", runtime.name());
            }
            assert_eq!(runtime.ok(&["list", "-q"]), id);
            assert!(runtime.ok(&["list"]).contains(id));
            state["pid"].as_i64().unwrap()
        };
        assert_eq!(shape("created"), i64::from(container.pid.as_raw()));
        container.start();
        container.wait_output("ready");
        assert_eq!(shape("running"), i64::from(container.pid.as_raw()));
        runtime.ok(&["pause", id]);
        shape("paused");
        runtime.ok(&["resume", id]);
        runtime.ok(&["kill", id, "KILL"]);
        assert_eq!(container.wait(), 137);
        wait_for("the end", || container.status() == "stopped");
        assert_eq!(shape("stopped"), 0);
        // Engines ask whether there is checkpointing by asking for its help.
        if runtime.is_coffer() {
            runtime.refuses(&["checkpoint", "--help"], "not supported");
            runtime.refuses(&["restore", "--help"], "not supported");
            runtime.refuses(&["checkpoint", id], "not supported");
        }
    }
}

#[test]
fn run_list_ps_events_and_update_answer() {
    let test = Test::new("verbs");
    let mut bundle = Bundle::new(&test, "echo in front; exit 12");
    let patient = json!(["/bin/sh", "-c", PATIENT]);
    for runtime in Runtime::all(&test) {
        let done = runtime.call(&["run", "--bundle", bundle.write(), &test.id()]);
        assert_eq!(
            (done.code, done.text()),
            (12, "in front"),
            "{}: {}",
            runtime.name(),
            done.stderr
        );
        let quick = std::mem::replace(&mut bundle.config["process"]["args"], patient.clone());
        bundle.config["linux"]["resources"]["memory"] = json!({"limit": 100 << 20});
        let container = runtime.create(bundle.write(), &[]);
        let id = container.id.as_str();
        container.start();
        container.wait_output("ready");
        let pids = runtime.ok(&["ps", "--format", "json", id]);
        let pids: Vec<i32> = serde_json::from_str(&pids).unwrap();
        assert!(
            pids.contains(&container.pid.as_raw()),
            "{}: {pids:?}",
            runtime.name()
        );
        assert!(runtime.ok(&["ps", id]).contains("PID"));

        let stats =
            || -> Value { serde_json::from_str(&runtime.ok(&["events", "--stats", id])).unwrap() };
        let first = stats();
        assert_eq!(
            (&first["type"], &first["id"]),
            (&json!("stats"), &json!(id))
        );
        let data = &first["data"];
        assert!(data["cpu"]["usage"]["total"].is_u64(), "{first}");
        assert!(
            data["pids"]["current"].as_u64().is_some_and(|n| n >= 1),
            "{first}"
        );
        assert!(
            data["memory"]["usage"]["usage"]
                .as_u64()
                .is_some_and(|n| n > 0),
            "{first}"
        );
        assert_eq!(
            data["memory"]["usage"]["limit"],
            100 << 20,
            "{}",
            runtime.name()
        );

        // A limit by each of the three ways.
        let file = test.dir().join("resources.json");
        let set = |limit: u64| json!({"memory": {"limit": limit}}).to_string();
        let limit = || {
            stats()["data"]["memory"]["usage"]["limit"]
                .as_u64()
                .unwrap()
        };
        runtime.ok(&["update", "--memory", &(90_u64 << 20).to_string(), id]);
        assert_eq!(limit(), 90 << 20, "{}", runtime.name());
        fs::write(&file, set(80 << 20)).unwrap();
        runtime.ok(&["update", &format!("--resources={}", file.display()), id]);
        assert_eq!(limit(), 80 << 20, "{}", runtime.name());
        let update = runtime.command(&["update", "--resources", "-", id]);
        let done = finish_with_input(update, set(70 << 20).into_bytes());
        assert_eq!(done.code, 0, "{}", done.stderr);
        assert_eq!(limit(), 70 << 20, "{}", runtime.name());
        runtime.ok(&["update", "--pids-limit=33", id]);
        assert_eq!(stats()["data"]["pids"]["limit"], 33, "{}", runtime.name());

        bundle.config["process"]["args"] = quick;
    }
    let spec = test.dir().join("spec");
    fs::create_dir(&spec).unwrap();
    for runtime in Runtime::all(&test) {
        runtime.ok(&["spec", "--bundle", spec.to_str().unwrap()]);
        let config = spec.join("config.json");
        let text = fs::read(&config).unwrap();
        let config_value: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(config_value["process"]["args"], json!(["sh"]));
        fs::remove_file(config).unwrap();
    }
}
