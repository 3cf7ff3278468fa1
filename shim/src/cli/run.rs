//! `coffer run`: a sandbox, its one container, and their end.

use super::client::{Process, StdioPaths, Task};
use super::options::{RunOptions, SourceOptions};
use super::session::{Caller, FORWARDED, Session};
use super::stdio::Fifos;
use super::supervisor::{self, Supervisor};
use super::values::{Cpus, MemorySize};
use super::{Error, bundle, oci_run, timings, unicode};
use crate::check;
use crate::config::Config;
use crate::machine::SandboxOptions;
use crate::removal;
use crate::spec::Bundle;
use crate::state::State;
use coffer_proto::ids::{ContainerId, SandboxId};
use oci_spec::runtime::LinuxMemory;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Where the output of a detached container goes, in the sandbox's directory.
pub(super) const OUTPUT_FILE: &str = "output.log";

/// Runs it; gives the exit status of the container, or 0 when it is detached.
pub(super) async fn run(config: &Config, options: &RunOptions) -> Result<u8, Error> {
    if let (Some(bundle), Some(id)) = (&options.source.bundle, &options.source.image) {
        return oci_run::run(config, id, bundle, options).await;
    }
    let began = Instant::now();
    check::need_root()?;
    let mut caller = Caller::listen(&FORWARDED)?;
    let id = options.name.clone().map_or_else(random_id, Ok)?;
    let choice = check::choose_hypervisor(
        options.hypervisor.unwrap_or(config.hypervisor),
        &config.libexec(),
    )?;
    if let Some(warning) = &choice.warning {
        eprintln!("coffer: {warning}");
    }
    check::guest_image(config).map_err(Error::GuestImage)?;
    if config.root.join(&id).exists() {
        return Err(Error::Exists { id });
    }

    let staging = Staging::make(&config.root, &id)?;
    let prepared = caller
        .unless_interrupted(prepare(&staging, options, &id, caller.interrupted()))
        .await?;
    let mut sandbox = config.sandbox(id.clone(), choice.hypervisor);
    size(&mut sandbox, options, &prepared, config);
    let supervisor = Supervisor::start(&sandbox, config.log_level.as_str()).await?;
    let run = Run {
        sandbox,
        options,
        prepared,
        began,
    };
    let result = run.in_sandbox(staging, &mut caller).await;
    if options.detach && result.is_ok() {
        if options.rm {
            supervisor::start_reaper(&config.root, &id)?;
        }
        println!("{id}");
        supervisor.detach();
        return result;
    }
    run.end(supervisor, result).await
}

/// What is to run.
struct Prepared {
    bundle: PathBuf,
    /// The bundle is in the staging directory, and moves.
    staged: bool,
    terminal: bool,
    memory_limit: Option<i64>,
}

async fn prepare(
    staging: &Staging,
    options: &RunOptions,
    id: &SandboxId,
    stop: Arc<AtomicBool>,
) -> Result<Prepared, Error> {
    let container = ContainerId::new(id.as_str()).expect("both kinds of id have the same form");
    let memory_limit = options.container.memory.map(|memory| memory.0);
    let terminal = options.container.process.tty;
    let bundle = match &options.source {
        SourceOptions {
            bundle: Some(path), ..
        } => return existing_bundle(path, &container, memory_limit),
        SourceOptions {
            rootfs: Some(path), ..
        } => bundle::around_rootfs(&staging.path, &container, &options.container, path)?,
        SourceOptions { image, .. } => {
            let reference = image.as_deref().expect("clap wants one of the three");
            tokio::task::block_in_place(|| {
                bundle::from_image(
                    &staging.path,
                    &container,
                    &options.container,
                    reference,
                    &stop,
                )
            })?
        }
    };
    Ok(Prepared {
        bundle,
        staged: true,
        terminal,
        memory_limit,
    })
}

/// The supervisor reads it too; here it is for a clear error before anything starts.
fn existing_bundle(
    path: &Path,
    container: &ContainerId,
    memory: Option<i64>,
) -> Result<Prepared, Error> {
    let rejected = |source| Error::Io {
        what: format!("the bundle {path:?} can't be used"),
        source,
    };
    let directory = path
        .canonicalize()
        .and_then(unicode::path)
        .map_err(rejected)?;
    let bundle = Bundle::load(&directory)?;
    let terminal = bundle.for_guest(container)?.terminal;
    let limits = bundle
        .spec()
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let limit = limits
        .and_then(|limits| limits.memory().as_ref())
        .and_then(LinuxMemory::limit);
    let memory_limit = memory.or(limit.filter(|limit| *limit > 0));
    Ok(Prepared {
        bundle: directory,
        staged: false,
        terminal,
        memory_limit,
    })
}

/// A limit of the container is added to what the guest needs for itself; without one the configuration decides.
fn size(sandbox: &mut SandboxOptions, options: &RunOptions, prepared: &Prepared, config: &Config) {
    sandbox.sized = true;
    if let Some(limit) = prepared.memory_limit {
        sandbox.memory_mib = MemorySize(limit).vm_mib(config.memory_overhead_mib);
    }
    if let Some(cpus) = options.container.cpus.map(Cpus::vcpus) {
        sandbox.vcpus = cpus;
        sandbox.max_vcpus = cpus;
    }
}

struct Run<'a> {
    sandbox: SandboxOptions,
    options: &'a RunOptions,
    prepared: Prepared,
    began: Instant,
}

impl Run<'_> {
    fn process(&self) -> Process {
        Process {
            container: self.sandbox.id.to_string(),
            exec: String::new(),
        }
    }

    /// Creates and starts the container; in the foreground also stays until its end.
    async fn in_sandbox(&self, staging: Staging, caller: &mut Caller) -> Result<u8, Error> {
        let directory = self.sandbox.dir();
        let bundle = if self.prepared.staged {
            let place = directory.join("bundle");
            let moved = fs::rename(&self.prepared.bundle, &place);
            moved.map_err(|source| Error::Io {
                what: format!("can't move the bundle to {place:?}"),
                source,
            })?;
            place
        } else {
            self.prepared.bundle.clone()
        };
        drop(staging);
        let task = Task::connect(&self.sandbox.root, &self.sandbox.id).await?;
        let (process, terminal) = (self.process(), self.prepared.terminal);
        if self.options.detach {
            let stdio = self.detached_stdio();
            let begin = async {
                task.create(&process.container, &bundle, &stdio).await?;
                task.start(&process).await.map_err(Error::from)
            };
            caller.unless_interrupted(begin).await?;
            self.show_timings();
            return Ok(0);
        }
        let fifos = Fifos::make(
            directory.join("io"),
            self.options.container.process.interactive,
            terminal,
        )?;
        let create = async {
            let paths = fifos.paths();
            let created = task.create(&process.container, &bundle, &paths).await;
            created.map_err(Error::from)
        };
        caller.unless_interrupted(create).await?;
        let session = Session {
            task,
            process,
            terminal,
        };
        let status = session.run(fifos, caller).await;
        self.show_timings();
        status
    }

    /// Output goes to a file, which `coffer logs` prints; there is no input.
    fn detached_stdio(&self) -> StdioPaths {
        let output = self
            .sandbox
            .dir()
            .join(OUTPUT_FILE)
            .to_string_lossy()
            .into_owned();
        let terminal = self.prepared.terminal;
        let stderr = if terminal {
            String::new()
        } else {
            output.clone()
        };
        StdioPaths {
            terminal,
            stdin: String::new(),
            stdout: output,
            stderr,
        }
    }

    fn show_timings(&self) {
        if !self.options.timings {
            return;
        }
        if let Ok(Some(state)) = State::load(&self.sandbox.root, &self.sandbox.id) {
            eprint!(
                "{}",
                timings::table(&state.phases, self.began.elapsed(), self.options.json)
            );
        }
    }

    /// Everything goes, whatever happened; what is known of the end is told first.
    async fn end(&self, supervisor: Supervisor, result: Result<u8, Error>) -> Result<u8, Error> {
        let task = Task::connect(&self.sandbox.root, &self.sandbox.id)
            .await
            .ok();
        if result.is_ok() {
            self.tell_end(task.as_ref()).await;
        }
        if let Some(task) = task {
            let process = self.process();
            if result.is_err() {
                let _ = task
                    .kill(&process, libc::SIGKILL.unsigned_abs(), true)
                    .await;
                let _ = tokio::time::timeout(super::KILL_TAKES, task.wait(&process)).await;
            }
            // Errors mean that something is gone already, and the end below removes the rest.
            let _ = task.delete(&process).await;
            let _ = task.shutdown(&self.sandbox.id).await;
        }
        let removed = supervisor.ended().await;
        let status = result?;
        removed?;
        Ok(status)
    }

    /// What the exit status does not say: the VM died, or the kernel killed for want of memory, maybe not init.
    async fn tell_end(&self, task: Option<&Task>) {
        let id = &self.sandbox.id;
        let state = State::load(&self.sandbox.root, id).ok().flatten();
        let exit = state.and_then(|state| state.containers.into_values().next()?.exit);
        let mut out_of_memory = exit.as_ref().is_some_and(|exit| exit.oom_killed);
        if let (Some(task), true) = (task, self.prepared.memory_limit.is_some()) {
            let stats = task.stats(id.as_str()).await;
            out_of_memory |= stats.is_ok_and(|stats| stats.memory_events.oom_kill > 0);
        }
        if out_of_memory {
            eprintln!("coffer: container {id}: out of memory, the kernel killed a process");
        }
        if let Some(reason) = exit.and_then(|exit| exit.reason) {
            eprintln!("coffer: container {id}: {reason}");
        }
    }
}

/// Twelve hexadecimal digits.
fn random_id() -> Result<SandboxId, Error> {
    let mut bytes = [0; 6];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|source| Error::Io {
        what: "can't read /dev/urandom".into(),
        source,
    })?;
    Ok(SandboxId::new(crate::image::hex(&bytes)).expect("hexadecimal digits are an id"))
}

/// Where a bundle is made before its sandbox exists: `<root>/.<id>`, which no sandbox can be named. Removed when dropped.
#[derive(Debug)]
struct Staging {
    path: PathBuf,
}

impl Staging {
    fn make(root: &Path, id: &SandboxId) -> Result<Self, Error> {
        let path = super::staging_directory(root, id);
        let failed = |source| Error::Io {
            what: format!("can't create {path:?}"),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(root)
            .map_err(failed)?;
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::Exists { id: id.clone() })
            }
            made => made.map_err(failed).map(|()| Self { path: path.clone() }),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = removal::remove_tree(&self.path) {
            eprintln!("coffer: can't remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_random() {
        let (a, b) = (random_id().unwrap(), random_id().unwrap());
        assert!(a != b && a.as_str().len() == 12);
    }

    #[test]
    fn a_staging_directory_is_one_runs_own_and_goes() {
        let root = tempfile::tempdir().unwrap();
        let id = SandboxId::new("x").unwrap();
        let staging = Staging::make(root.path(), &id).unwrap();
        assert!(matches!(
            Staging::make(root.path(), &id),
            Err(Error::Exists { .. })
        ));
        drop(staging);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
