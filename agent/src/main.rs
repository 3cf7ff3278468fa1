//! `coffer-agent`: PID 1 of the guest, and all that its initrd holds.
//!
//! ```text
//! kernel ── /init ──► init.rs   mounts, cgroup2, lo, limits
//!                     home.rs   dials the shim, serves the `Agent` service on that connection
//!                     rpc.rs    one short method per verb ──► sandbox.rs ──► container/
//!                     reaper.rs SIGCHLD ──► the process's exit
//!                     mirror.rs  copies of small volumes, in which changes raise inotify events
//!                     streams.rs one vsock connection per stdio stream
//!                     forward.rs one per TCP connection that the host makes to the guest's loopback
//!                     resolver.rs one for the DNS queries that a resolver of the host answers
//! ```
//!
//! [`boot`] and [`console`] are for the start; [`guest`], [`cpus`], [`disks`] and [`network`] are the guest as a machine. [`sandbox`] keeps its
//! containers and processes in [`table`]s; a [`process`] has [`stdio`]; [`events`] is what the shim hears unasked; [`pause`] is PID 1 of a
//! PID namespace that is shared.
//!
//! The agent has threads, and a process with threads can't safely run code between fork and exec. Whatever must
//! happen there runs in this same program, started anew under another `argv[0]`: see [`Role`].

mod boot;
mod console;
mod container;
mod cpus;
mod disks;
mod events;
mod forward;
mod guest;
mod home;
mod init;
mod mirror;
mod network;
mod pause;
mod process;
mod reaper;
mod resolver;
mod rpc;
mod sandbox;
mod stdio;
mod streams;
mod table;

use std::sync::Arc;

/// What this run of the program is, told by `argv[0]`.
enum Role {
    /// PID 1 of the guest.
    Agent,
    /// The single-threaded helper which makes one container, or one process in it.
    ContainerStage,
    /// PID 1 of a PID namespace that the containers of the pod share.
    Pause,
}

impl Role {
    fn of(program: Option<&std::ffi::OsStr>) -> Self {
        match program.and_then(|name| name.to_str()) {
            Some(container::STAGE_NAME) => Self::ContainerStage,
            Some(pause::NAME) => Self::Pause,
            _ => Self::Agent,
        }
    }
}

fn main() {
    match Role::of(std::env::args_os().next().as_deref()) {
        Role::ContainerStage => container::stage_main(),
        Role::Pause => pause::main(),
        Role::Agent if std::process::id() == 1 => agent(),
        Role::Agent => {
            eprintln!("coffer-agent is PID 1 of a Coffer guest and does nothing elsewhere");
            std::process::exit(1);
        }
    }
}

/// Threads that drive futures. Two, so that one long poll does not hold up the other streams; each costs memory.
const WORKERS: usize = 2;
/// Threads for calls that block, such as making a container. They end when idle.
const BLOCKING_THREADS: usize = 16;
/// Futures here are shallow; the default of 2 MiB would only be address space, but the guest overcommits nothing.
const STACK_BYTES: usize = 512 << 10;

/// The life of PID 1. It never returns: the end of the agent is the end of the machine.
fn agent() -> ! {
    console::end_machine_on_panic();
    let mut phases = boot::Phases::default();
    phases.reach("kernel");
    let result = init::prepare(&mut phases)
        .map_err(anyhow::Error::from)
        .and_then(|()| {
            network::bring_loopback_up()?;
            phases.reach("loopback");
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(WORKERS)
                .max_blocking_threads(BLOCKING_THREADS)
                .thread_stack_size(STACK_BYTES)
                .enable_all()
                .build()?;
            runtime.block_on(serve(phases))
        });
    if let Err(error) = result {
        console::line(format_args!("{error:#}"));
    }
    guest::end_machine()
}

/// Serves the shim until it goes away.
async fn serve(mut phases: boot::Phases) -> anyhow::Result<()> {
    let reaper = reaper::Reaper::start()?;
    phases.reach("runtime");
    let sandbox = Arc::new(sandbox::Sandbox::new(reaper, phases));
    let streams = streams::Listener::bind()?;
    tokio::spawn(streams.serve(sandbox.clone()));
    home::serve(sandbox).await?;
    Ok(())
}
