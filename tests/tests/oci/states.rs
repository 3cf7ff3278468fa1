//! Which transition a container may make, and what is said of the others.

use super::PATIENT;
use coffer_tests::bundle::Bundle;
use coffer_tests::oci::Runtime;
use coffer_tests::{Test, wait_for};
use serde_json::json;

/// A refused transition: the verb with its arguments, where `@` is the container and `.` the bundle, and what engines look
/// for in the message.
type Refused = (&'static [&'static str], &'static str);

fn each_is_refused(runtime: &Runtime<'_>, bundle: &str, id: &str, table: &[Refused]) {
    for (words, message) in table {
        let word = |word: &&'static str| match *word {
            "@" => id,
            "." => bundle,
            word => word,
        };
        let words: Vec<_> = words.iter().map(word).collect();
        let done = runtime.refuses(&words, message);
        // The code of a failed exec must not look like a program's.
        let codes = if words[0] == "exec" {
            [125, 255]
        } else {
            [1, 1]
        };
        assert!(
            codes.contains(&done.code),
            "{} {words:?}: code {}",
            runtime.name(),
            done.code
        );
        let lines = done.stderr.trim_end().lines().count();
        assert_eq!(lines, 1, "{} {words:?}: {}", runtime.name(), done.stderr);
    }
}

#[test]
fn every_illegal_transition_is_refused_in_words_that_engines_know() {
    let test = Test::new("states");
    let mut bundle = Bundle::new(&test, PATIENT);
    for runtime in Runtime::all(&test) {
        let dir = bundle.write().to_owned();
        let unknown: [Refused; 10] = [
            (&["state", "@"], "does not exist"),
            (&["start", "@"], "does not exist"),
            (&["kill", "@", "9"], "does not exist"),
            (&["delete", "@"], "does not exist"),
            (&["exec", "@", "true"], "does not exist"),
            (&["pause", "@"], "does not exist"),
            (&["resume", "@"], "does not exist"),
            (&["ps", "@"], "does not exist"),
            (&["events", "--stats", "@"], "does not exist"),
            (&["update", "--pids-limit", "5", "@"], "does not exist"),
        ];
        each_is_refused(&runtime, &dir, "nobody", &unknown);
        assert_eq!(runtime.ok(&["delete", "--force", "nobody"]), "");

        let container = runtime.create(&dir, &[]);
        let id = container.id.as_str();
        assert_eq!(container.status(), "created");
        // What the specification says about the config of a created container: changes to it have no effect.
        bundle.config["process"]["args"] = json!(["false"]);
        bundle.write();
        let twice: [Refused; 2] = [
            (&["create", "--bundle", ".", "@"], "already exists"),
            (&["resume", "@"], "not paused"),
        ];
        each_is_refused(&runtime, &dir, id, &twice);

        container.start();
        container.wait_output("ready");
        assert_eq!(container.status(), "running");
        let running: [Refused; 4] = [
            (&["start", "@"], "already running"),
            (&["delete", "@"], "is not stopped: running"),
            (&["resume", "@"], "not paused"),
            (&["kill", "@", "NOSIGNAL"], "NOSIGNAL"),
        ];
        each_is_refused(&runtime, &dir, id, &running);

        runtime.ok(&["pause", id]);
        assert_eq!(container.status(), "paused");
        let paused: [Refused; 4] = [
            (&["start", "@"], "paused"),
            (&["pause", "@"], "not running"),
            (&["exec", "@", "true"], "cannot exec in a paused container"),
            (&["delete", "@"], "is not stopped: paused"),
        ];
        each_is_refused(&runtime, &dir, id, &paused);
        runtime.ok(&["resume", id]);
        assert_eq!(container.status(), "running");

        runtime.ok(&["kill", id, "TERM"]);
        assert_eq!(container.wait(), 3, "{}", runtime.name());
        wait_for("the container to stop", || container.status() == "stopped");
        assert_eq!(runtime.state(id)["pid"], 0);
        let stopped: [Refused; 7] = [
            (&["start", "@"], "cannot start a container that has stopped"),
            (&["kill", "@", "TERM"], "container not running"),
            (&["exec", "@", "true"], "cannot exec in a stopped container"),
            (&["pause", "@"], "container not running"),
            (&["resume", "@"], "not paused"),
            (&["events", "--stats", "@"], "not running"),
            (&["update", "--pids-limit", "5", "@"], "not running"),
        ];
        each_is_refused(&runtime, &dir, id, &stopped);
        each_is_refused(&runtime, &dir, id, &twice[..1]);
        runtime.ok(&["delete", id]);
        each_is_refused(&runtime, &dir, id, &[(&["delete", "@"], "does not exist")]);
        bundle.config["process"]["args"] = json!(["/bin/sh", "-c", PATIENT]);
    }
}
