//! How things end: a process of the guest, the VM, a container's traces on the host, the sandbox.

use super::events::SandboxState;
use super::pod::Pod;
use super::process::{self, Exit, ProcessKey};
use super::{Sandbox, on_host};
use crate::agent::{AgentError, Ended};
use crate::cleanup;
use crate::crash;
use crate::machine::{Death, Machine, Notice};
use crate::state::{ExitRecord, Status};
use coffer_proto::error_chain::chain;
use coffer_proto::ids::ContainerId;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::timeout;

/// After init's end the execs end too, by the PID namespace; then they are counted as killed.
const EXECS_END: Duration = Duration::from_secs(2);
/// What a process wrote before its end is passed on before the end is told, if a reader takes it this fast.
const DRAIN_BEFORE_EXIT: Duration = Duration::from_millis(500);

impl Sandbox {
    /// Ends the VM in order and frees what the sandbox has on the host. Returns when that is done, whoever began it.
    pub async fn stop(&self, reason: &'static str) {
        let began = self
            .change(move |pod| pod.begin_orderly_stop(reason))
            .await
            .unwrap_or(false);
        crash::point("stop.begun");
        let machine = self.shared.machine.borrow().clone();
        match machine {
            // The watch over the machine sees its end and does the rest.
            Some(machine) if began => machine.shut_down().await,
            // No VM, or a boot under way, which fails when its processes end.
            None if began => self.finish(reason.to_owned().into()).await,
            _ => {}
        }
        let mut status = self.shared.status.subscribe();
        let _ = status
            .wait_for(|state| matches!(state, SandboxState::Stopped { .. }))
            .await;
    }

    /// Ends the VM at once, for a reason that every container is then told.
    pub(super) async fn fail(&self, machine: &Machine, reason: &'static str) {
        let _ = self.change(move |pod| pod.begin_stop(reason)).await;
        machine.kill().await;
    }

    /// Watches over a machine until it is gone.
    pub(super) fn watch_machine(&self, machine: Arc<Machine>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            let death = loop {
                match machine.notice().await {
                    Notice::OutOfMemory(id) => {
                        tracing::warn!(container = %id, "out of memory");
                        let told = sandbox.change(move |pod| pod.out_of_memory(&id)).await;
                        if let Ok(Some(bundle)) = told {
                            leave_oom_file(&bundle);
                        }
                    }
                    Notice::Gone(death) => break death,
                }
            };
            sandbox.finish(death).await;
        });
    }

    /// The VM is gone or never was: tells every container and frees the host.
    async fn finish(&self, death: Death) {
        tracing::info!(death.reason, "the VM is gone");
        let Ok(death) = self.change(move |pod| pod.vm_gone(&death)).await else {
            return;
        };
        self.shared.machine.send_replace(None);
        crash::point("stop.vm-gone");
        // Who is told of the end looks into the state for its reason.
        self.record_death(&death);
        let _ = self.change(move |pod| pod.all_died(death)).await;
        let owned = self.shared.state.get();
        match tokio::task::spawn_blocking(move || cleanup::release(&owned)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(error = chain(&error), "something of the sandbox is left");
            }
            Err(error) => tracing::error!(%error, "the cleanup crashed"),
        }
        crash::point("stop.released");
        let _ = self.change(Pod::stopped).await;
    }

    fn record_death(&self, death: &Death) {
        let exit = ExitRecord {
            status: process::VM_DIED,
            at: SystemTime::now(),
            reason: Some(death.reason.clone()),
            oom_killed: death.out_of_memory,
        };
        self.record(|state| {
            state.status = Status::Stopped {
                reason: death.reason.clone(),
            };
            for container in state.containers.values_mut() {
                container.exit.get_or_insert_with(|| exit.clone());
            }
        });
    }

    /// Writes the state where a failure must not keep the sandbox from going on.
    pub(super) fn record(&self, change: impl FnOnce(&mut crate::state::State)) {
        if let Err(error) = self.shared.state.update(change) {
            tracing::error!(
                error = chain(&error),
                "the sandbox's state is only in memory"
            );
        }
    }

    /// Follows a process of the guest to its end.
    pub(super) fn watch_process(&self, machine: &Arc<Machine>, key: ProcessKey) {
        let (sandbox, agent) = (self.clone(), machine.agent.clone());
        tokio::spawn(async move {
            let exit = match agent.wait_process(&key).await {
                Ok(Ended { status, oom_killed }) => Exit {
                    status,
                    at: SystemTime::now(),
                    reason: None,
                    oom_killed,
                },
                // The VM's end says it for everyone.
                Err(AgentError::Broken { .. }) => return,
                Err(error) => Exit {
                    status: 255,
                    at: SystemTime::now(),
                    reason: Some(chain(&error)),
                    oom_killed: false,
                },
            };
            sandbox.process_ended(key, exit).await;
        });
    }

    async fn process_ended(&self, key: ProcessKey, exit: Exit) {
        let target = key.clone();
        let killed = exit.status == process::VM_DIED;
        let found = self.apply(move |pod| {
            if killed {
                // What is killed by the VM's end is told of with that, and its reason.
                pod.alive()?;
            }
            let drained = pod
                .process(&target)?
                .io
                .as_ref()
                .map(crate::io::ProcessIo::drained);
            let execs = pod
                .container(&target.container)?
                .execs
                .values()
                .map(process::Process::waiter);
            let execs: Vec<_> = if target.exec.is_none() {
                execs.collect()
            } else {
                Vec::new()
            };
            let bundle = pod.container(&target.container)?.bundle.clone();
            Ok((drained, execs, bundle))
        });
        // Deleted already, and nobody is interested any more; or told of later.
        let Ok((drained, execs, bundle)) = found.await else {
            return;
        };
        let _ = timeout(EXECS_END, async {
            for mut exec in execs {
                let _ = exec.wait_for(Option::is_some).await;
            }
        })
        .await;
        if let Some(drained) = drained {
            let _ = timeout(DRAIN_BEFORE_EXIT, drained).await;
        }
        if key.exec.is_none() {
            if exit.oom_killed {
                leave_oom_file(&bundle);
            }
            let record = ExitRecord {
                status: exit.status,
                at: exit.at,
                reason: exit.reason.clone(),
                oom_killed: exit.oom_killed,
            };
            self.record(|state| {
                if let Some(container) = state.containers.get_mut(&key.container) {
                    container.exit = Some(record);
                }
            });
        }
        let _ = self.change(move |pod| pod.exited(&key, exit)).await;
    }

    /// Takes away what a container has on the host.
    pub(super) async fn remove_from_host(&self, id: &ContainerId, machine: Option<&Arc<Machine>>) {
        if let Some(machine) = machine {
            machine.mirrors.remove_container(id).await;
            machine.detach_disks(id).await;
            let (machine, container) = (machine.clone(), id.clone());
            let removed = on_host(move || Ok(machine.share.remove_container(&container)?));
            if let Err(error) = removed.await {
                tracing::error!(container = %id, error = chain(&error), "a mount of the container is left until the sandbox stops");
            }
        }
        let mounted = self
            .shared
            .state
            .get()
            .containers
            .get(id)
            .and_then(|container| container.mounted_rootfs.clone());
        if let Some(rootfs) = mounted
            && let Err(error) = on_host(move || Ok(cleanup::unmount(&rootfs)?)).await
        {
            tracing::error!(container = %id, error = chain(&error), "the container's root is left mounted");
            return;
        }
        self.record(|state| {
            state.containers.remove(id);
            state.stand_ins.retain(|known| known.container != *id);
        });
    }
}

/// CRI-O and podman look for this file to know that a container ended for want of memory.
fn leave_oom_file(bundle: &Path) {
    if let Err(error) = fs::write(bundle.join("oom"), "") {
        tracing::debug!(bundle = %bundle.display(), %error, "no oom file");
    }
}
