//! The pod's events as containerd's messages.

use super::timestamp;
use crate::containerd::publisher::Publisher;
use crate::sandbox::events::TaskEvent;
use containerd_shim_protos::events::task as events;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;

/// Queues an event for containerd.
pub fn publish(publisher: &Publisher, event: TaskEvent) {
    match event {
        TaskEvent::Create {
            container,
            bundle,
            stdio,
            pid,
        } => {
            let io = events::TaskIO {
                stdin: stdio.stdin,
                stdout: stdio.stdout,
                stderr: stdio.stderr,
                terminal: stdio.terminal,
                ..Default::default()
            };
            let message = events::TaskCreate {
                container_id: container.into(),
                bundle: bundle.to_string_lossy().into_owned(),
                io: MessageField::some(io),
                pid,
                ..Default::default()
            };
            publisher.publish(topics::TASK_CREATE_EVENT_TOPIC, &message);
        }
        TaskEvent::Start { container, pid } => {
            let message = events::TaskStart {
                container_id: container.into(),
                pid,
                ..Default::default()
            };
            publisher.publish(topics::TASK_START_EVENT_TOPIC, &message);
        }
        TaskEvent::ExecAdded { container, exec } => {
            let message = events::TaskExecAdded {
                container_id: container.into(),
                exec_id: exec.into(),
                ..Default::default()
            };
            publisher.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &message);
        }
        TaskEvent::ExecStarted {
            container,
            exec,
            pid,
        } => {
            let message = events::TaskExecStarted {
                container_id: container.into(),
                exec_id: exec.into(),
                pid,
                ..Default::default()
            };
            publisher.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &message);
        }
        TaskEvent::Oom { container } => {
            let message = events::TaskOOM {
                container_id: container.into(),
                ..Default::default()
            };
            publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &message);
        }
        TaskEvent::Paused { container } => {
            let message = events::TaskPaused {
                container_id: container.into(),
                ..Default::default()
            };
            publisher.publish(topics::TASK_PAUSED_EVENT_TOPIC, &message);
        }
        TaskEvent::Resumed { container } => {
            let message = events::TaskResumed {
                container_id: container.into(),
                ..Default::default()
            };
            publisher.publish(topics::TASK_RESUMED_EVENT_TOPIC, &message);
        }
        TaskEvent::Exit { process, pid, exit } => {
            // containerd names an init process by its container here, and by nothing in a delete.
            let id = process
                .exec
                .map_or_else(|| process.container.to_string(), Into::into);
            let message = events::TaskExit {
                container_id: process.container.into(),
                id,
                pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..Default::default()
            };
            publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, &message);
        }
        TaskEvent::Delete { process, pid, exit } => {
            let message = events::TaskDelete {
                container_id: process.container.into(),
                id: process.exec.map(Into::into).unwrap_or_default(),
                pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..Default::default()
            };
            publisher.publish(topics::TASK_DELETE_EVENT_TOPIC, &message);
        }
    }
}
