//! The VMM process of one sandbox: takes the VM's configuration and its files from the control socket, locks itself up,
//! and runs the VM until it ends.

use anyhow::{Context, bail};
use coffer_hypervisor::control::{self, Control};
use coffer_hypervisor::event_loop::EventLoop;
use coffer_hypervisor::machine::{self, Machine};
use coffer_hypervisor::metrics::ProcessMetrics;
use coffer_hypervisor::seccomp::{self, ThreadClass};
use coffer_hypervisor::{clock, jail};
use coffer_proto::vmm::{CONTROL_FD, Exit, Files, Reply, Request, VmConfig};
use kvm_ioctls::Kvm;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::process::ExitCode;

fn main() -> ExitCode {
    clock::start();
    match run() {
        Ok(Exit::Reset | Exit::Stopped) => ExitCode::SUCCESS,
        Ok(Exit::TripleFault | Exit::Failed { .. }) => ExitCode::from(2),
        Err(error) => {
            coffer_hypervisor::report(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<Exit> {
    jail::close_inherited(CONTROL_FD)?;
    let control =
        Control::inherited().context("there is no control socket; the shim starts this program")?;
    control::report_panics();
    let supervisor = control::supervisor(control.as_fd());
    let (request, files) = control.receive()?;
    let Request::Boot(config) = request else {
        bail!("the first request is not Boot")
    };
    match boot(&config, files) {
        Ok((machine, metrics)) => {
            control.reply(Reply::Done)?;
            Ok(EventLoop::new(machine, control, supervisor, metrics)?.run())
        }
        Err(error) => {
            control.reply(Reply::Failed {
                message: format!("{error:#}"),
            })?;
            Err(error)
        }
    }
}

/// From the configuration to a machine that is ready to run, in a process that is locked up.
fn boot(config: &VmConfig, mut files: Files) -> anyhow::Result<(Machine, ProcessMetrics)> {
    machine::check(config)?;
    let mut metrics = ProcessMetrics::new();
    let kvm = open_kvm(
        files.take(
            config
                .kvm
                .context("there is no /dev/kvm in the configuration")?,
        )?,
    );
    let vm = machine::create_vm(&kvm)?;
    metrics.vm_created();
    jail::enter(config.uid)?;
    metrics.phase("jailed", clock::since_start());
    let machine = Machine::build(&kvm, vm, config, &mut files)?;
    metrics.phase("built", clock::since_start());
    machine.wait_until_ready()?;
    jail::enter_last_limits(machine.largest_file)?;
    seccomp::enter(ThreadClass::Main)?;
    Ok((machine, metrics))
}

#[allow(unsafe_code)]
fn open_kvm(file: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is open and nobody else has it. If it is not /dev/kvm, the first ioctl fails.
    unsafe { Kvm::from_raw_fd(file.into_raw_fd()) }
}
