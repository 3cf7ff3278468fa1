//! `cargo xtask test`: unit tests, then one end-to-end suite on both hypervisors.
//!
//! The suite runs on this machine with hypervisor `qemu`, then with `coffer-vmm` in the test node. For the node, nextest
//! starts each test through a runner, which is this program: it restores a fresh node and runs the test in it. So every
//! test in the node has a machine of its own, and a node that dies takes one try of one test with it.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::cache::remove_tree;
use crate::node::{self, Node};
use crate::project::Project;
use crate::{assets, build, dist, process};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Run one layer only
    #[arg(long)]
    only: Option<Layer>,
    /// Run only the tests that match this nextest expression, for example 'test(exec)'
    #[arg(short = 'E', long = "filter")]
    filter: Option<String>,
    /// Also run the long versions of tests
    #[arg(long)]
    heavy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Layer {
    /// Unit tests of all crates
    Unit,
    /// End to end on this machine, guests in QEMU
    Qemu,
    /// End to end in the test node, guests in coffer-vmm on KVM
    Node,
}

const SUITE: &str = "coffer-tests";
/// The disk image that the node's runner gives to each node.
const SHARE_VARIABLE: &str = "COFFER_NODE_SHARE";
const RUNNER_VARIABLE: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";
/// Variables of nextest's and of the tests that a test in the node needs as well.
const PASSED_VARIABLES: [&str; 4] = ["COFFER_TEST_", "NEXTEST", "RUST_BACKTRACE", "RUST_LOG"];

/// Runs the layers one after the other; all of them, even when one fails.
pub fn run(project: &Project, arguments: &Arguments) -> Result<()> {
    let wanted = |layer| arguments.only.is_none_or(|only| only == layer);
    let mut failed = Vec::new();
    let mut layer = |layer, run: &dyn Fn() -> Result<bool>| -> Result<()> {
        if wanted(layer) {
            eprintln!("--> tests: {layer:?}");
            if !run()? {
                failed.push(format!("{layer:?}"));
            }
        }
        Ok(())
    };
    layer(Layer::Unit, &|| unit(project, arguments))?;
    if wanted(Layer::Qemu) || wanted(Layer::Node) {
        build::run(project)?;
        build::crash_points(project)?;
    }
    layer(Layer::Qemu, &|| qemu(project, arguments))?;
    layer(Layer::Node, &|| in_node(project, arguments))?;
    ensure!(failed.is_empty(), "tests failed: {}", failed.join(", "));
    Ok(())
}

fn unit(project: &Project, arguments: &Arguments) -> Result<bool> {
    let mut nextest = nextest(project, arguments, "default");
    passes(nextest.args(["--workspace", "--exclude", SUITE]))
}

fn qemu(project: &Project, arguments: &Arguments) -> Result<bool> {
    let mut nextest = nextest(project, arguments, "qemu");
    nextest.args(["--package", SUITE]);
    nextest.env("COFFER_TEST_HYPERVISOR", "qemu");
    nextest.env("COFFER_TEST_PRODUCT", project.product());
    nextest.env("COFFER_TEST_ASSETS", assets::get(project)?);
    passes(&mut nextest)
}

fn in_node(project: &Project, arguments: &Arguments) -> Result<bool> {
    Node::get(project)?;
    let inside = Path::new(node::SHARE);
    let package = dist::package(project)?;
    let package_inside = inside
        .join("tests")
        .join(package.file_name().context("a file has a name")?);
    let mut files = test_programs(project)?;
    files.push(package);
    let share = node_share(project, &files)?;
    let mut nextest = nextest(project, arguments, "node");
    nextest.args(["--package", SUITE]);
    nextest.env("COFFER_TEST_HYPERVISOR", "coffer-vmm");
    nextest.env("COFFER_TEST_PRODUCT", inside.join("product"));
    nextest.env("COFFER_TEST_ASSETS", node::ASSETS);
    nextest.env("COFFER_TEST_PACKAGE", package_inside);
    nextest.env(SHARE_VARIABLE, share);
    let runner = env::current_exe().context("find this program")?;
    nextest.env(RUNNER_VARIABLE, format!("{} node-test", runner.display()));
    passes(&mut nextest)
}

fn nextest(project: &Project, arguments: &Arguments, profile: &str) -> Command {
    let mut nextest = project.cargo();
    nextest.args(["nextest", "run", "--locked", "--profile", profile]);
    if let Some(filter) = &arguments.filter {
        // A filter for one layer may match nothing in another.
        nextest.args(["-E", filter, "--no-tests=pass"]);
    }
    if arguments.heavy {
        nextest.arg("--ignore-default-filter");
    }
    nextest.stdin(Stdio::null());
    nextest
}

fn passes(nextest: &mut Command) -> Result<bool> {
    Ok(nextest.status().context("start cargo nextest")?.success())
}

/// The disk image with the product and, in `tests/`, more files.
pub fn node_share(project: &Project, files: &[PathBuf]) -> Result<PathBuf> {
    let dir = project.target.join("node");
    let content = dir.join("share");
    remove_tree(&content)?;
    let (product, tests) = (content.join("product"), content.join("tests"));
    for dir in [&product, &tests] {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    for entry in fs::read_dir(project.product())? {
        let path = entry?.path();
        link(&path, &product)?;
    }
    for file in files {
        link(file, &tests)?;
    }
    let image = dir.join("share.erofs");
    node::share_disk(&content, &image)?;
    Ok(image)
}

fn link(file: &Path, dir: &Path) -> Result<()> {
    let name = file.file_name().context("a file has a name")?;
    fs::hard_link(file, dir.join(name)).with_context(|| format!("link {}", file.display()))
}

/// Compiles the suite and returns its programs.
fn test_programs(project: &Project) -> Result<Vec<PathBuf>> {
    let mut cargo = project.cargo();
    cargo.args([
        "test",
        "--no-run",
        "--locked",
        "--quiet",
        "--package",
        SUITE,
        "--message-format=json",
    ]);
    let messages = process::output(&mut cargo)?;
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).context("read cargo's messages")?;
        if let Some(program) = message["executable"].as_str() {
            programs.push(PathBuf::from(program));
        }
    }
    if programs.is_empty() {
        bail!("{SUITE} has no test programs");
    }
    Ok(programs)
}

/// nextest's runner for the node: runs one test program with its arguments in a node of its own.
pub fn run_in_node(project: &Project, command: &[OsString]) -> Result<ExitCode> {
    let (program, arguments) = command.split_first().context("no test program")?;
    if arguments.iter().any(|argument| argument == "--list") {
        // Which tests there are needs no node.
        let status = Command::new(program).args(arguments).status()?;
        return Ok(if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let share =
        env::var_os(SHARE_VARIABLE).with_context(|| format!("{SHARE_VARIABLE} is not set"))?;
    let name = Path::new(program)
        .file_name()
        .context("the test program has no name")?;
    let inside = Path::new(node::SHARE)
        .join("tests")
        .join(name)
        .into_os_string();
    let command = [&[inside], arguments].concat();
    let environment: Vec<_> = env::vars_os().filter(|(name, _)| is_passed(name)).collect();
    let status = Node::get(project)?.run(Some(Path::new(&share)), &command, &environment)?;
    Ok(ExitCode::from(status))
}

fn is_passed(variable: &OsStr) -> bool {
    let name = variable.to_string_lossy();
    PASSED_VARIABLES
        .iter()
        .any(|prefix| name.starts_with(prefix))
}
