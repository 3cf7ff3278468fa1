use super::capabilities::{CAPABILITIES, DEFAULT_CAPABILITIES, capability};
use super::seccomp::{SeccompProfile, profile};
use super::*;
use clap::Parser;
use oci_spec::runtime::Spec;
use std::collections::BTreeSet;
use std::fs;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: ContainerOptions,
}

fn options(words: &[&str]) -> ContainerOptions {
    Line::try_parse_from([&["run"], words].concat())
        .unwrap()
        .options
}

fn make(words: &[&str], image: &RunConfig) -> Result<Value, SpecError> {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("etc")).unwrap();
    fs::write(
        directory.path().join("etc/passwd"),
        "root:x:0:0::/root:\nweb:x:33:34::/srv:\n",
    )
    .unwrap();
    let root = Root::open(directory.path()).unwrap();
    super::make(
        &ContainerId::new("c1").unwrap(),
        &options(words),
        image,
        &root,
    )
}

fn image() -> RunConfig {
    RunConfig {
        entrypoint: Some(vec!["/entry".into()]),
        cmd: Some(vec!["default".into()]),
        env: Some(vec!["A=image".into(), "PATH=/image".into()]),
        user: "web".into(),
        working_dir: Some("/srv".into()),
    }
}

#[test]
fn the_result_is_a_spec_of_the_oci_crate() {
    let spec = make(
        &[
            "--ulimit",
            "nofile=1:2",
            "--netns",
            "/run/netns/x",
            "--",
            "sh",
        ],
        &RunConfig::default(),
    )
    .unwrap();
    let spec: Spec = serde_json::from_value(spec).unwrap();
    let process = spec.process().as_ref().unwrap();
    assert_eq!(process.args().as_deref().unwrap(), ["sh"]);
    let limits = process.rlimits().as_ref().unwrap();
    assert_eq!(
        limits
            .iter()
            .filter(|limit| limit.typ().to_string() == "RLIMIT_NOFILE")
            .count(),
        1
    );
    let linux = spec.linux().as_ref().unwrap();
    assert!(linux.seccomp().is_some());
    let namespaces = linux.namespaces().as_ref().unwrap();
    assert!(
        namespaces
            .iter()
            .any(|namespace| namespace.path().as_deref() == Some("/run/netns/x".as_ref()))
    );
}

#[test]
fn the_image_gives_what_nobody_asked_for() {
    let spec = make(&[], &image()).unwrap();
    let process = &spec["process"];
    assert_eq!(process["args"], json!(["/entry", "default"]));
    assert_eq!(
        (
            &process["cwd"],
            &process["user"]["uid"],
            &process["user"]["gid"]
        ),
        (&json!("/srv"), &json!(33), &json!(34))
    );
    assert_eq!(
        process["env"],
        json!(["PATH=/image", "HOSTNAME=c1", "HOME=/srv", "A=image"])
    );
    // Not root: nothing in effect, but the bounding set stays.
    assert_eq!(process["capabilities"]["effective"], json!([]));
    assert_eq!(
        process["capabilities"]["bounding"]
            .as_array()
            .unwrap()
            .len(),
        DEFAULT_CAPABILITIES.len()
    );
}

#[test]
fn options_win_over_the_image() {
    let words = [
        "--env",
        "A=mine",
        "--user",
        "0:5",
        "--workdir",
        "/w",
        "-t",
        "--hostname",
        "h",
        "--read-only",
        "--",
        "mine",
    ];
    let spec = make(&words, &image()).unwrap();
    let process = &spec["process"];
    assert_eq!(process["args"], json!(["/entry", "mine"]));
    assert_eq!(
        (
            &process["cwd"],
            &process["user"]["gid"],
            &process["terminal"]
        ),
        (&json!("/w"), &json!(5), &json!(true))
    );
    assert_eq!(
        process["env"],
        json!([
            "PATH=/image",
            "HOSTNAME=h",
            "TERM=xterm",
            "HOME=/root",
            "A=mine"
        ])
    );
    assert_eq!(
        (&spec["hostname"], &spec["root"]["readonly"]),
        (&json!("h"), &json!(true))
    );
}

#[test]
fn limits_and_mounts() {
    let volume = tempfile::tempdir().unwrap();
    let bind = format!("{}:/data:ro", volume.path().display());
    let words = [
        "--memory", "64m", "--cpus", "1.5", "--sysctl", "net.a=1", "--volume", &bind, "--", "x",
    ];
    let spec = make(&words, &RunConfig::default()).unwrap();
    assert_eq!(
        spec["linux"]["resources"]["memory"]["limit"],
        json!(64 << 20)
    );
    assert_eq!(
        spec["linux"]["resources"]["cpu"],
        json!({"quota": 150_000, "period": 100_000})
    );
    assert_eq!(spec["linux"]["sysctl"], json!({"net.a": "1"}));
    let mount = spec["mounts"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&mount["destination"], &mount["options"][2]),
        (&json!("/data"), &json!("ro"))
    );
    let missing = make(
        &["--volume", "/no/such:/x", "--", "x"],
        &RunConfig::default(),
    )
    .unwrap_err();
    assert!(missing.to_string().contains("/no/such"));
}

#[test]
fn what_can_not_be_is_named() {
    let error = |words: &[&str]| make(words, &RunConfig::default()).unwrap_err().to_string();
    assert!(error(&[]).contains("no command"));
    assert!(error(&["--user", "nobody-here", "--", "x"]).contains("nobody-here"));
    assert!(error(&["--workdir", "here", "--", "x"]).contains("here"));
    assert!(error(&["--cap-add", "FLY", "--", "x"]).contains("FLY"));
}

#[test]
fn capabilities_are_added_and_dropped() {
    let set = |words: &[&str]| capabilities::of(&options(words)).unwrap();
    assert!(set(&["--cap-add", "net_admin"]).contains("CAP_NET_ADMIN"));
    assert!(!set(&["--cap-drop", "CAP_CHOWN"]).contains("CAP_CHOWN"));
    assert_eq!(
        set(&["--cap-drop", "ALL", "--cap-add", "KILL"])
            .into_iter()
            .collect::<Vec<_>>(),
        ["CAP_KILL"]
    );
    assert_eq!(
        set(&["--cap-add", "all", "--cap-drop", "bpf"]).len(),
        CAPABILITIES.len() - 1
    );
}

#[test]
fn the_profile_follows_the_capabilities() {
    let allowed = |capabilities: &[&str]| {
        let rules = profile(&capabilities.iter().map(ToString::to_string).collect());
        rules["syscalls"][0]["names"]
            .as_array()
            .unwrap()
            .iter()
            .any(|name| name == "mount")
    };
    assert!(!allowed(&[]) && allowed(&["CAP_SYS_ADMIN"]));
    let _: oci_spec::runtime::LinuxSeccomp =
        serde_json::from_value(profile(&BTreeSet::new())).unwrap();
    // Every capability that the profile names exists.
    let file: SeccompProfile = serde_json::from_str(include_str!("../seccomp.json")).unwrap();
    assert!(
        file.with_capability
            .keys()
            .all(|name| capability(name).is_ok())
    );
}
