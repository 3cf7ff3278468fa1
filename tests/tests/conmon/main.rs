//! conmon alone over the OCI command line: the cases of conmon's own test suite that a runtime has a part in, and how conmon sees one fail.
//!
//! Every test runs with runc first, so that what is expected of Coffer is what conmon gets from runc.

mod life;
mod logs;
mod protocol;

use coffer_tests::conmon::Conmon;
use coffer_tests::oci::Runtime;

/// Removes a stopped or failed container, as podman's exit command does.
fn remove(runtime: &Runtime<'_>, conmon: &Conmon<'_>) {
    runtime.ok(&["delete", "--force", &conmon.id]);
}
