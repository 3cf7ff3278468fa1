//! Takes a sandbox off the host, knowing only what `state.json` says.
//!
//! Every way a sandbox ends comes through here: an orderly stop, a failed boot, the VM's death, and `coffer delete` of a
//! sandbox whose supervisor was killed. All steps can be repeated, and a failed step does not keep the next ones
//! from being done, so what is left is the least possible and a second run finishes it.

use crate::cgroup::{CgroupError, SandboxCgroup};
use crate::machine::child::ProcessId;
use crate::network::{self, NetworkError};
use crate::removal;
use crate::share::{Share, ShareError};
use crate::state::{State, StateError};
use coffer_proto::ids::SandboxId;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// SIGKILL ends a process at once unless it sits in the kernel.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// Why something of a sandbox is still there.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("can't end process {pid} of the sandbox")]
    Kill { pid: i32, source: io::Error },
    #[error("can't unmount {path}")]
    Unmount { path: PathBuf, source: Errno },
    #[error("can't take the sandbox's share away")]
    Share(#[from] ShareError),
    #[error("can't remove the sandbox's cgroup")]
    Cgroup(#[from] CgroupError),
    #[error("can't undo the redirection of the pod's network")]
    Network(#[from] NetworkError),
    #[error("can't remove {path}")]
    Remove { path: PathBuf, source: io::Error },
}

/// Ends whatever is left of the sandbox `id` and removes its directory. A sandbox that does not exist is no error.
/// Blocks until its processes have ended, so it must not be called on a thread that drives async tasks.
pub fn cleanup(root: &Path, id: &SandboxId) -> Result<(), CleanupError> {
    let dir = root.join(id);
    let released = match State::load(root, id) {
        Ok(Some(state)) => release(&state),
        // Without a state nothing was made but, at most, the directory itself.
        Ok(None) => Ok(()),
        Err(error) => Err(error.into()),
    };
    let share = Share::remove(&dir);
    released?;
    share?;
    removal::remove_tree(&dir).map_err(|source| CleanupError::Remove { path: dir, source })
}

/// Frees everything the state names except the directory with the state itself. Gives the first error of all steps.
/// Blocks as [`cleanup`] does.
pub fn release(state: &State) -> Result<(), CleanupError> {
    let processes = [Some(state.supervisor), state.hypervisor, state.fsd];
    let mut results: Vec<Result<(), CleanupError>> = processes.iter().flatten().map(kill).collect();
    results.push(Share::remove(&state.options.dir()).map_err(Into::into));
    for container in state.containers.values() {
        results.extend(container.mounted_rootfs.as_deref().map(unmount));
    }
    if let Some(netns) = &state.netns {
        results.push(undo_network(netns));
    }
    if let Some(path) = &state.cgroup {
        results.push(SandboxCgroup::at(path).remove().map_err(Into::into));
    }
    results.into_iter().collect()
}

/// The supervisor itself calls this too, and is not to end.
fn kill(process: &ProcessId) -> Result<(), CleanupError> {
    if u32::try_from(process.pid) == Ok(std::process::id()) {
        return Ok(());
    }
    process
        .kill(KILL_DEADLINE)
        .map_err(|source| CleanupError::Kill {
            pid: process.pid,
            source,
        })
}

fn undo_network(netns: &Path) -> Result<(), CleanupError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(|_| NetworkError::Thread)?;
    Ok(runtime.block_on(network::detach(netns))?)
}

/// Takes everything away that is mounted on a container's root.
pub fn unmount(path: &Path) -> Result<(), CleanupError> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(source) => {
                return Err(CleanupError::Unmount {
                    path: path.to_owned(),
                    source,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::child::Child;
    use crate::state::{StateFile, tests::options};
    use coffer_proto::ids::ContainerId;
    use std::ffi::OsStr;
    use std::fs;
    use std::os::fd::AsFd;

    #[tokio::test]
    async fn a_dead_supervisors_sandbox_goes_completely_and_twice() {
        let root = tempfile::tempdir().unwrap();
        let volume = tempfile::tempdir().unwrap();
        fs::write(volume.path().join("kept"), "kept").unwrap();
        let options = options(root.path(), "s");
        let (dir, id) = (options.dir(), options.id.clone());
        fs::create_dir(&dir).unwrap();
        let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let start = || {
            Child::spawn(
                Path::new("/bin/sleep"),
                &[OsStr::new("600")],
                theirs.as_fd(),
            )
            .unwrap()
        };
        let (supervisor, fsd) = (start(), start());
        let state = StateFile::create(State::new(options, supervisor.id)).unwrap();
        state.update(|state| state.fsd = Some(fsd.id)).unwrap();
        let share = Share::create(&dir).unwrap();
        share
            .add_rootfs(&ContainerId::new("c").unwrap(), volume.path(), false)
            .unwrap();
        drop(state);
        for _ in 0..2 {
            let (root, id) = (root.path().to_owned(), id.clone());
            tokio::task::spawn_blocking(move || cleanup(&root, &id).unwrap())
                .await
                .unwrap();
        }
        assert!(!dir.exists() && !supervisor.id.is_alive() && !fsd.id.is_alive());
        assert!(volume.path().join("kept").exists());
        assert!(
            !fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .contains(dir.to_str().unwrap())
        );
    }
}
