//! What is refused, and where the reason is found.

use coffer_tests::Test;
use coffer_tests::bundle::Bundle;
use coffer_tests::oci::Runtime;
use serde_json::{Value, json};
use std::fs;

#[test]
fn a_failed_create_says_why_and_leaves_nothing() {
    let test = Test::new("failed");
    let mut bundle = Bundle::new(&test, "true");
    let dir = bundle.write().to_owned();
    let good = bundle.config.clone();
    let pid_file = test.dir().join("pid");
    // Field of the config, its value, and what the message must name. podman makes exit codes 126 and 127 of two of them.
    let bad: [(&str, Value, &str); 5] = [
        (
            "/process/args",
            json!(["/no/such"]),
            "no such file or directory",
        ),
        (
            "/process/args",
            json!(["nosuch"]),
            "executable file not found in",
        ),
        ("/process/args", json!(["/etc/passwd"]), "permission denied"),
        ("/process/args", json!([]), "args"),
        ("/root/path", json!("/no/root"), "/no/root"),
    ];
    for runtime in Runtime::all(&test) {
        for (field, value, message) in &bad {
            *bundle.config.pointer_mut(field).unwrap() = value.clone();
            bundle.write();
            let words = [
                "--bundle",
                &dir,
                "--pid-file",
                pid_file.to_str().unwrap(),
                "bad",
            ];
            println!("{}: {field} = {value}", runtime.name());
            runtime.refuses_create(&words, message);
            assert!(!pid_file.exists(), "{}: {field} = {value}", runtime.name());
            runtime.refuses(&["state", "bad"], "does not exist");
            bundle.config = good.clone();
        }
        fs::remove_file(format!("{dir}/config.json")).unwrap();
        runtime.refuses_create(&["--bundle", &dir, "bad"], "config.json");
        bundle.write();
    }
}

#[test]
fn words_that_are_wrong_are_refused() {
    let test = Test::new("words");
    let bundle = Bundle::new(&test, "true");
    let dir = bundle.write().to_owned();
    for runtime in Runtime::all(&test) {
        runtime.refuses(&["create", "--bundle", &dir, "../bad"], "");
        runtime.refuses(&["create", "--bundle", &dir, ""], "");
        runtime.refuses(&["create", "--bundle", &dir], "");
        runtime.refuses(&["create", "--nosuch", "bad"], "nosuch");
        runtime.refuses(&["nosuch"], "nosuch");
    }
}

/// podman and go-runc read the reason from a log.
#[test]
fn the_log_has_the_reason() {
    let test = Test::new("log");
    for runtime in Runtime::all(&test) {
        for (format, starts) in [("json", "{"), ("text", "time=")] {
            let log = test.dir().join(format!("log.{format}"));
            let log = log.to_str().unwrap();
            runtime.refuses(
                &["--log", log, "--log-format", format, "start", "nobody"],
                "",
            );
            let flags = [format!("--log={log}"), format!("--log-format={format}")];
            runtime.refuses(&[&flags[0], &flags[1], "kill", "nobody"], "");
            let text = fs::read_to_string(log).unwrap();
            let lines: Vec<_> = text.lines().collect();
            assert_eq!(lines.len(), 2, "{}: {text}", runtime.name());
            for line in lines {
                assert!(line.starts_with(starts), "{}: {line}", runtime.name());
                assert!(
                    line.contains("does not exist"),
                    "{}: {line}",
                    runtime.name()
                );
                if format == "json" {
                    let record: Value = serde_json::from_str(line).unwrap();
                    assert_eq!(record["level"], "error");
                    assert!(record["msg"].is_string() && record["time"].is_string());
                }
            }
            fs::remove_file(log).unwrap();
        }
    }
}
