use super::*;
use proptest::prelude::*;

struct Rig {
    pod: Pod,
    events: mpsc::UnboundedReceiver<TaskEvent>,
}

impl Rig {
    fn new() -> Self {
        let (tx, events) = mpsc::unbounded_channel();
        Self {
            pod: Pod::new(tx),
            events,
        }
    }

    /// The VM's end, to its last consequence.
    fn die(&mut self, reason: &str) {
        let death = self.pod.vm_gone(&Death::from(reason.to_owned()));
        self.pod.all_died(death);
    }

    /// A pod whose VM runs and in which container `c` was created.
    fn with_container() -> Self {
        let mut rig = Self::new();
        assert_eq!(
            rig.pod
                .begin_create(&id("c"), "/b".into(), StdioPaths::default())
                .unwrap(),
            Admission::Boot
        );
        rig.pod.booted(7);
        rig.pod.created(&key("c", None), ProcessIo::none()).unwrap();
        rig
    }

    fn running() -> Self {
        let mut rig = Self::with_container();
        rig.start(&key("c", None));
        rig
    }

    fn start(&mut self, key: &ProcessKey) {
        self.pod.begin_start(key).unwrap();
        self.pod.started(key).unwrap();
    }

    fn exec(&mut self, name: &str) -> ProcessKey {
        let key = key("c", Some(name));
        self.pod
            .begin_exec(&key, &ExecId::new(name).unwrap(), StdioPaths::default())
            .unwrap();
        self.pod.created(&key, ProcessIo::none()).unwrap();
        key
    }

    /// The events so far, as short words.
    fn told(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            told.push(match event {
                TaskEvent::Create { container, .. } => format!("create {container}"),
                TaskEvent::Start { container, .. } => format!("start {container}"),
                TaskEvent::ExecAdded { exec, .. } => format!("added {exec}"),
                TaskEvent::ExecStarted { exec, .. } => format!("start {exec}"),
                TaskEvent::Oom { container } => format!("oom {container}"),
                TaskEvent::Paused { container } => format!("paused {container}"),
                TaskEvent::Resumed { container } => format!("resumed {container}"),
                TaskEvent::Exit { process, exit, .. } => {
                    format!("exit {} {}", name(&process), exit.status)
                }
                TaskEvent::Delete { process, exit, .. } => {
                    format!("delete {} {}", name(&process), exit.status)
                }
            });
        }
        told
    }
}

fn id(name: &str) -> ContainerId {
    ContainerId::new(name).unwrap()
}

fn key(container: &str, exec: Option<&str>) -> ProcessKey {
    ProcessKey {
        container: id(container),
        exec: exec.map(|e| ExecId::new(e).unwrap()),
    }
}

fn name(key: &ProcessKey) -> String {
    key.exec
        .as_ref()
        .map_or_else(|| key.container.to_string(), ToString::to_string)
}

fn exit(status: u32) -> Exit {
    Exit {
        status,
        at: SystemTime::now(),
        reason: None,
        oom_killed: false,
    }
}

#[test]
fn a_prepared_sandbox_stays_without_containers_until_it_is_stopped() {
    let mut rig = Rig::new();
    assert!(matches!(
        rig.pod.begin_prepared_boot(),
        Err(Error::NotPrepared)
    ));
    rig.pod.prepare(crate::machine::Pod::default()).unwrap();
    assert!(matches!(
        rig.pod.prepare(crate::machine::Pod::default()),
        Err(Error::SandboxExists)
    ));
    let too_early = rig
        .pod
        .begin_create(&id("c"), "/b".into(), StdioPaths::default());
    assert!(matches!(too_early, Err(Error::NotStarted)));
    assert!(
        rig.pod.idle_since().is_some(),
        "one that nobody starts ends by itself"
    );
    rig.pod.begin_prepared_boot().unwrap();
    rig.pod.booted(7);
    let joined = rig
        .pod
        .begin_create(&id("c"), "/b".into(), StdioPaths::default());
    assert_eq!(joined.unwrap(), Admission::Join);
    rig.pod.created(&key("c", None), ProcessIo::none()).unwrap();
    rig.pod.begin_delete(&key("c", None)).unwrap();
    rig.pod.deleted(&key("c", None)).unwrap();
    assert!(!rig.pod.is_unneeded() && rig.pod.idle_since().is_none());
    assert!(rig.pod.begin_orderly_stop("stopped"));
    rig.die("exited");
    rig.pod.stopped();
    let ended = rig.pod.describe_sandbox(SystemTime::now());
    assert!(ended.ended.is_some() && ended.exit_status() == 0);
}

#[test]
fn the_death_of_a_prepared_sandbox_is_no_orderly_end() {
    let mut rig = Rig::new();
    rig.pod.prepare(crate::machine::Pod::default()).unwrap();
    rig.pod.begin_prepared_boot().unwrap();
    rig.pod.booted(7);
    rig.die("killed");
    rig.pod.stopped();
    let ended = rig.pod.describe_sandbox(SystemTime::now());
    assert_eq!(ended.exit_status(), VM_DIED);
}

#[test]
fn a_whole_life_is_told_in_order() {
    let mut rig = Rig::running();
    rig.pod.exited(&key("c", None), exit(42));
    rig.pod.begin_delete(&key("c", None)).unwrap();
    assert_eq!(rig.pod.deleted(&key("c", None)).unwrap().1.status, 42);
    assert_eq!(
        rig.told(),
        ["create c", "start c", "exit c 42", "delete c 42"]
    );
    assert!(rig.pod.is_unneeded() && rig.pod.idle_since().is_some());
}

#[test]
fn an_end_before_the_start_was_told_comes_after_it() {
    let mut rig = Rig::with_container();
    let init = key("c", None);
    rig.pod.begin_start(&init).unwrap();
    rig.pod.exited(&init, exit(0));
    assert_eq!(
        rig.pod.process(&init).unwrap().state(),
        ProcessState::Starting
    );
    rig.pod.started(&init).unwrap();
    assert_eq!(rig.told(), ["create c", "start c", "exit c 0"]);
    assert_eq!(rig.pod.describe(&init).unwrap().exit.unwrap().status, 0);
}

#[test]
fn what_is_killed_before_the_agent_lets_it_run_has_ended_and_never_started() {
    let init = key("c", None);
    for told_first in [true, false] {
        let mut rig = Rig::with_container();
        rig.pod.begin_start(&init).unwrap();
        if told_first {
            rig.pod.exited(&init, exit(137));
            rig.pod.ended_unstarted(&init);
        } else {
            rig.pod.ended_unstarted(&init);
            rig.pod.exited(&init, exit(137));
        }
        assert_eq!(rig.told(), ["create c", "exit c 137"]);
    }
}

#[test]
fn an_exec_that_is_being_deleted_can_be_neither_started_nor_deleted_again() {
    let mut rig = Rig::running();
    let exec = rig.exec("e");
    rig.pod.begin_delete(&exec).unwrap();
    let refusals = [
        rig.pod.begin_start(&exec).unwrap_err(),
        rig.pod.begin_delete(&exec).unwrap_err(),
        rig.pod.check_signal(&exec).unwrap_err(),
    ];
    assert!(
        refusals
            .iter()
            .all(|error| error.code() == ttrpc::Code::NOT_FOUND)
    );
    rig.told();
    rig.pod.deleted(&exec).unwrap();
    assert_eq!(rig.told(), ["exit e 137", "delete e 137"]);
}

#[test]
fn execs_end_before_their_init() {
    let mut rig = Rig::running();
    let exec = rig.exec("e");
    rig.start(&exec);
    rig.pod.exited(&key("c", None), exit(3));
    assert_eq!(
        rig.told(),
        [
            "create c",
            "start c",
            "added e",
            "start e",
            "exit e 137",
            "exit c 3"
        ]
    );
    rig.pod.exited(&exec, exit(0));
    assert!(rig.told().is_empty(), "a process ended twice");
}

#[test]
fn a_vm_that_the_host_had_no_memory_for_is_told_as_such() {
    let mut rig = Rig::running();
    rig.told();
    let death = Death {
        reason: "no memory".into(),
        out_of_memory: true,
    };
    assert_eq!(rig.pod.vm_gone(&death), death);
    rig.pod.all_died(death);
    assert_eq!(rig.told(), ["oom c", "exit c 137"]);
    let exit = rig.pod.describe(&ProcessKey::init(id("c"))).unwrap().exit;
    assert!(exit.unwrap().oom_killed);
}

#[test]
fn the_vms_death_reaches_everything_once_with_the_first_reason() {
    let mut rig = Rig::running();
    let exec = rig.exec("e");
    rig.start(&exec);
    rig.pod
        .begin_create(&id("late"), "/b".into(), StdioPaths::default())
        .unwrap();
    rig.told();
    let first = Death::from("coffer-vmm was killed by signal 9".to_owned());
    assert_eq!(rig.pod.vm_gone(&first), first);
    assert!(rig.told().is_empty(), "told before it is written down");
    rig.pod.all_died(first.clone());
    assert_eq!(
        rig.told(),
        ["exit e 137", "exit c 137"],
        "a container that never was is not told"
    );
    let second = Death {
        reason: "something else".into(),
        out_of_memory: true,
    };
    assert_eq!(rig.pod.vm_gone(&second), first);
    rig.pod.all_died(first);
    rig.pod.exited(&exec, exit(0));
    rig.pod.stopped();
    assert!(rig.told().is_empty());
    let end = rig.pod.describe(&key("c", None)).unwrap();
    assert_eq!((end.pid, end.exit.clone().unwrap().status), (7, 137));
    assert_eq!(
        end.exit.unwrap().reason.unwrap(),
        "coffer-vmm was killed by signal 9"
    );
    let refused = rig
        .pod
        .begin_create(&id("d"), "/b".into(), StdioPaths::default());
    assert!(matches!(refused, Err(Error::Stopped(reason)) if reason.contains("signal 9")));
    rig.pod.begin_delete(&key("c", None)).unwrap();
    rig.pod.deleted(&key("c", None)).unwrap();
}

#[test]
fn verbs_in_the_wrong_state_say_so() {
    let mut rig = Rig::running();
    let init = key("c", None);
    let code = |error: Error| error.code();
    assert_eq!(
        code(rig.pod.begin_start(&init).unwrap_err()),
        ttrpc::Code::FAILED_PRECONDITION
    );
    assert_eq!(
        code(rig.pod.begin_delete(&init).unwrap_err()),
        ttrpc::Code::FAILED_PRECONDITION
    );
    assert_eq!(
        code(rig.pod.resumed(&id("c")).unwrap_err()),
        ttrpc::Code::FAILED_PRECONDITION
    );
    let again = rig
        .pod
        .begin_create(&id("c"), "/b".into(), StdioPaths::default())
        .unwrap_err();
    assert_eq!(code(again), ttrpc::Code::ALREADY_EXISTS);
    assert_eq!(
        code(rig.pod.describe(&key("x", None)).unwrap_err()),
        ttrpc::Code::NOT_FOUND
    );
    assert_eq!(
        code(rig.pod.describe(&key("c", Some("x"))).unwrap_err()),
        ttrpc::Code::NOT_FOUND
    );
    rig.pod.exited(&init, exit(1));
    assert_eq!(
        code(rig.pod.check_signal(&init).unwrap_err()),
        ttrpc::Code::NOT_FOUND
    );
    rig.pod.begin_delete(&init).unwrap();
    assert_eq!(
        code(rig.pod.begin_delete(&init).unwrap_err()),
        ttrpc::Code::NOT_FOUND
    );
    assert_eq!(
        code(rig.pod.describe(&init).unwrap_err()),
        ttrpc::Code::NOT_FOUND
    );
}

#[test]
fn a_created_container_can_be_deleted_and_counts_as_killed() {
    let mut rig = Rig::with_container();
    let init = key("c", None);
    rig.pod.begin_delete(&init).unwrap();
    assert_eq!(rig.pod.deleted(&init).unwrap().1.status, 137);
    assert_eq!(rig.told(), ["create c", "exit c 137", "delete c 137"]);
}

#[test]
fn pause_covers_the_execs_and_a_killed_paused_container_ends() {
    let mut rig = Rig::running();
    let exec = rig.exec("e");
    rig.start(&exec);
    rig.pod.paused(&id("c")).unwrap();
    assert_eq!(
        rig.pod.process(&exec).unwrap().state(),
        ProcessState::Paused
    );
    let late = key("c", Some("late"));
    let refused = rig
        .pod
        .begin_exec(&late, &ExecId::new("late").unwrap(), StdioPaths::default());
    assert_eq!(
        refused.unwrap_err().code(),
        ttrpc::Code::FAILED_PRECONDITION
    );
    rig.pod.resumed(&id("c")).unwrap();
    rig.pod.paused(&id("c")).unwrap();
    rig.pod.exited(&key("c", None), exit(137));
    assert_eq!(
        rig.pod.process(&exec).unwrap().state(),
        ProcessState::Stopped
    );
}

#[test]
fn a_foreign_oom_is_not_told() {
    let mut rig = Rig::running();
    rig.told();
    rig.pod.out_of_memory(&id("someone"));
    rig.pod.out_of_memory(&id("c"));
    assert_eq!(rig.told(), ["oom c"]);
}

#[test]
fn an_end_for_want_of_memory_is_told_after_its_cause_and_the_cause_once() {
    let mut rig = Rig::running();
    rig.told();
    let killed = Exit {
        oom_killed: true,
        ..exit(137)
    };
    rig.pod.exited(&key("c", None), killed);
    // The agent's notice comes late.
    rig.pod.out_of_memory(&id("c"));
    assert_eq!(rig.told(), ["oom c", "exit c 137"]);
}

#[test]
fn a_stop_while_booting_stays() {
    let mut rig = Rig::new();
    rig.pod
        .begin_create(&id("c"), "/b".into(), StdioPaths::default())
        .unwrap();
    assert!(rig.pod.begin_stop("told to"));
    rig.pod.booted(7);
    assert_eq!(
        *rig.pod.state(),
        SandboxState::Stopping {
            reason: "told to".into()
        }
    );
    assert!(matches!(
        rig.pod.created(&key("c", None), ProcessIo::none()),
        Err(Error::Stopped(_))
    ));
}

/// One thing that may happen to a pod, in any order.
#[derive(Debug, Clone)]
enum Step {
    Create(u8),
    Created(u8),
    Start(u8),
    Started(u8),
    EndedUnstarted(u8),
    Exited(u8),
    Delete(u8),
    Deleted(u8),
    Pause(u8),
    Resume(u8),
    Died,
    Stopped,
}

fn step() -> impl Strategy<Value = Step> {
    let one = 0..3u8;
    prop_oneof![
        4 => one.clone().prop_map(Step::Create),
        4 => one.clone().prop_map(Step::Created),
        4 => one.clone().prop_map(Step::Start),
        4 => one.clone().prop_map(Step::Started),
        1 => one.clone().prop_map(Step::EndedUnstarted),
        3 => one.clone().prop_map(Step::Exited),
        2 => one.clone().prop_map(Step::Delete),
        2 => one.clone().prop_map(Step::Deleted),
        1 => one.clone().prop_map(Step::Pause),
        1 => one.prop_map(Step::Resume),
        1 => Just(Step::Died),
        1 => Just(Step::Stopped),
    ]
}

proptest! {
    /// Whatever callers and guest do, each container is told at most once as create, start, exit, delete, in this
    /// order, and never started or deleted without what must come before.
    #[test]
    fn every_order_of_events_is_legal(steps in proptest::collection::vec(step(), 1..80)) {
        let mut rig = Rig::new();
        rig.pod.booted(7);
        for step in steps {
            let init = |n: &u8| key(&format!("c{n}"), None);
            // Refusals are fine; what is told is what counts.
            match &step {
                Step::Create(n) => drop(rig.pod.begin_create(&init(n).container, "/b".into(), StdioPaths::default())),
                Step::Created(n) => {
                    if rig.pod.process(&init(n)).is_ok_and(|p| p.state() == ProcessState::Creating) {
                        drop(rig.pod.created(&init(n), ProcessIo::none()));
                    }
                }
                Step::Start(n) => drop(rig.pod.begin_start(&init(n))),
                Step::Started(n) => drop(rig.pod.started(&init(n))),
                Step::EndedUnstarted(n) => rig.pod.ended_unstarted(&init(n)),
                Step::Exited(n) => {
                    if rig.pod.process(&init(n)).is_ok_and(|p| p.state() != ProcessState::Creating) {
                        rig.pod.exited(&init(n), exit(0));
                    }
                }
                Step::Delete(n) => drop(rig.pod.begin_delete(&init(n))),
                Step::Deleted(n) => {
                    if rig.pod.process(&init(n)).is_err() {
                        drop(rig.pod.deleted(&init(n)));
                    }
                }
                Step::Pause(n) => drop(rig.pod.paused(&init(n).container)),
                Step::Resume(n) => drop(rig.pod.resumed(&init(n).container)),
                Step::Died => rig.die("test"),
                Step::Stopped => rig.pod.stopped(),
            }
        }
        let told = rig.told();
        for n in 0..3 {
            let mut last = "delete";
            for event in told.iter().filter(|event| event.split(' ').nth(1) == Some(&format!("c{n}"))) {
                let verb = event.split(' ').next().unwrap();
                let legal = match verb {
                    "create" => last == "delete",
                    "start" => last == "create",
                    "exit" => matches!(last, "create" | "start" | "paused" | "resumed"),
                    "delete" => last == "exit",
                    "paused" => matches!(last, "start" | "resumed"),
                    "resumed" => last == "paused",
                    _ => false,
                };
                prop_assert!(legal, "c{n}: {verb} after {last} in {told:?}");
                last = verb;
            }
        }
    }
}
