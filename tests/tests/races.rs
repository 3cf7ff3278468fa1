//! Two callers at once: whatever the order in which their calls meet, each gets a legal answer, every process is told of in the order
//! create, start, exit, delete with one exit, and nothing of it is left.
//!
//! Each pair of verbs is a test of some seconds, and one of a thousand rounds that runs with `cargo xtask test --heavy`. All rounds of a test
//! are in one VM and with the same names, so what one leaves behind the next one stumbles over. The second call comes after a
//! random part of the time that the first took lately. `COFFER_RACE_SEED` repeats the delays of a run, which prints its seed.

use coffer_tests::bundle::Bundle;
use coffer_tests::shim::Shim;
use coffer_tests::task::{Task, code_of};
use coffer_tests::{Test, wait_for};
use containerd_shim_protos::api;
use serde_json::json;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use ttrpc::Code;

/// How long a test goes on where nobody asked for all rounds.
const SHORT: Duration = Duration::from_secs(10);
const ALL_ROUNDS: u32 = 1000;
/// The container of a round, and its exec.
const C: &str = "c";
const E: &str = "e";
/// The container that lives as long as the VM.
const POD: &str = "pod";
const KILLED: u32 = 137;

/// Answers that somebody may get who came too late, or too early.
const LOST: &[Code] = &[Code::NOT_FOUND, Code::FAILED_PRECONDITION];

/// A VM in which rounds are run, and the dice.
struct Arena<'t> {
    shim: Shim<'t>,
    task: Task,
    /// Bundles of a container that stays and of one that ends at once.
    stays: String,
    ends: String,
    random: u64,
    /// About how long the first call of a pair takes.
    span: Duration,
    round: u32,
}

impl<'t> Arena<'t> {
    fn new(test: &'t Test) -> Self {
        let seed = std::env::var("COFFER_RACE_SEED").map_or_else(
            |_| {
                let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
                u64::from(since_1970.expect("after 1970").subsec_nanos())
            },
            |seed| seed.parse().expect("COFFER_RACE_SEED is a number"),
        );
        println!("COFFER_RACE_SEED={seed}");
        let bundle = |script: &str| {
            let mut bundle = Bundle::new(test, script);
            bundle.config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": POD});
            bundle.write().to_owned()
        };
        let stays = bundle("exec sleep 6000");
        let shim = Shim::start(test, stays.as_ref(), POD);
        let task = shim.task();
        task.create(POD, &stays, "").expect("the pod is created");
        task.start(POD, "").expect("the pod is started");
        Self {
            shim,
            task,
            ends: bundle("exit 0"),
            stays,
            random: seed | 1,
            span: Duration::from_millis(20),
            round: 0,
        }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// True and false by turns.
    fn odd(&self) -> bool {
        self.round % 2 == 1
    }

    /// Both calls at once, the second one later by a random time.
    fn both<A: Send, B: Send>(
        &mut self,
        first: impl FnOnce(&Task) -> A + Send,
        second: impl FnOnce(&Task) -> B + Send,
    ) -> (A, B) {
        let longest = u64::try_from(self.span.as_micros()).expect("seconds") * 5 / 4;
        let delay = Duration::from_micros(self.random() % longest.max(1));
        let task = &self.task;
        let (first, took, second) = std::thread::scope(|scope| {
            let second = scope.spawn(move || {
                std::thread::sleep(delay);
                second(task)
            });
            let since = Instant::now();
            let first = first(task);
            let took = since.elapsed();
            (first, took, second.join().expect("the second caller"))
        });
        self.span = (self.span * 3 + took) / 4;
        (first, second)
    }

    fn running(&self, bundle: &str) {
        self.task.create(C, bundle, "").expect("create");
        self.task.start(C, "").expect("start");
    }

    /// Ends a process that the round left, in whatever state, and looks at what was told of it.
    fn settle(&self, id: &str, exec: &str) {
        let task = &self.task;
        if let Ok(state) = task.state(id, exec)
            && state.status.enum_value() != Ok(api::Status::STOPPED)
        {
            allowed("kill", &task.kill_process(id, exec, 9), LOST);
            task.wait(id, exec).expect("wait");
        }
        allowed("delete", &task.delete(id, exec), &[Code::NOT_FOUND]);
        assert_eq!(
            code_of(&task.state(id, exec).expect_err("it is deleted")),
            Some(Code::NOT_FOUND)
        );
        let mut told = Vec::new();
        wait_for("the delete to be told", || {
            told = self.told(id, exec);
            told.is_empty() || told.last().is_some_and(|last| last == "delete")
        });
        assert_legal(&told);
    }

    /// What was told of all processes of this name, from the first round on.
    fn told(&self, id: &str, exec: &str) -> Vec<String> {
        let events = self.shim.events().into_iter();
        let of_it = events.filter(|event| event.container == id && event.exec == exec);
        let word = |topic: String| topic.rsplit('/').next().unwrap_or_default().to_owned();
        of_it.map(|event| word(event.topic)).collect()
    }
}

/// Fails unless a call succeeded or was refused with one of these codes.
fn allowed<T: std::fmt::Debug>(verb: &str, result: &ttrpc::Result<T>, codes: &[Code]) {
    if let Err(error) = result {
        let code = code_of(error);
        assert!(
            code.is_some_and(|code| codes.contains(&code)),
            "{verb}: {error}"
        );
    }
}

fn assert_legal(told: &[String]) {
    let mut last = "";
    for word in told {
        let before: &[&str] = match word.as_str() {
            "create" | "exec-added" => &["", "delete"],
            "start" => &["create"],
            "exec-started" => &["exec-added"],
            "paused" => &["start", "resumed"],
            "resumed" => &["paused"],
            "exit" => &[
                "create",
                "exec-added",
                "start",
                "exec-started",
                "paused",
                "resumed",
            ],
            "delete" => &["exit"],
            _ => &[],
        };
        assert!(before.contains(&last), "{word} after {last:?} in {told:?}");
        last = word;
    }
    assert!(["", "delete"].contains(&last), "{told:?}");
}

/// Rounds of one pair, for some seconds or a thousand times.
fn race(name: &str, rounds: Option<u32>, round: fn(&mut Arena<'_>)) {
    let test = Test::new(name);
    let mut arena = Arena::new(&test);
    let since = Instant::now();
    while rounds.map_or(since.elapsed() < SHORT, |rounds| arena.round < rounds) {
        round(&mut arena);
        arena.round += 1;
    }
    println!("{} rounds in {:?}", arena.round, since.elapsed());
    // The VM works, and no process is left in the container that outlived them all.
    let task = &arena.task;
    task.exec(POD, "last", &["true"], false).expect("exec");
    task.start(POD, "last").expect("start");
    assert_eq!(task.wait(POD, "last").expect("wait"), 0);
    task.delete(POD, "last").expect("delete");
    let request = api::PidsRequest {
        id: POD.into(),
        ..Default::default()
    };
    let pids = task.client().pids(Task::context(), &request);
    assert_eq!(pids.expect("pids").processes.len(), 1);
    task.kill(POD, 9).expect("kill");
    assert_eq!(task.wait(POD, "").expect("wait"), KILLED);
    task.delete(POD, "").expect("delete");
}

/// Both tests of each pair.
macro_rules! races {
    ($($pair:ident),+ $(,)?) => {
        $(#[test]
        fn $pair() {
            race(concat!("race", stringify!($pair)), None, rounds::$pair);
        })+

        mod heavy_thousand {
            use super::*;

            $(#[test]
            fn $pair() {
                race(concat!("race", stringify!($pair)), Some(ALL_ROUNDS), rounds::$pair);
            })+
        }
    };
}

races! {
    create_kill,
    start_kill,
    start_delete,
    exec_kill,
    exec_delete,
    resize_exit,
    delete_delete,
    pause_delete,
}

mod rounds {
    use super::*;

    pub fn create_kill(arena: &mut Arena<'_>) {
        let bundle = arena.stays.clone();
        let (created, killed) =
            arena.both(|task| task.create(C, &bundle, ""), |task| task.kill(C, 9));
        created.expect("create");
        allowed("kill", &killed, LOST);
        if killed.is_ok() {
            // What was killed before its start can't be started any more.
            if arena.odd() {
                allowed("start", &arena.task.start(C, ""), LOST);
            }
            assert_eq!(arena.task.wait(C, "").expect("wait"), KILLED);
        }
        arena.settle(C, "");
    }

    pub fn start_kill(arena: &mut Arena<'_>) {
        arena.task.create(C, &arena.stays, "").expect("create");
        let (started, killed) = arena.both(|task| task.start(C, ""), |task| task.kill(C, 9));
        allowed("start", &started, LOST);
        killed.expect("kill");
        assert_eq!(arena.task.wait(C, "").expect("wait"), KILLED);
        arena.settle(C, "");
    }

    pub fn start_delete(arena: &mut Arena<'_>) {
        let (id, exec) = if arena.odd() { (POD, E) } else { (C, "") };
        if arena.odd() {
            arena.task.exec(POD, E, &["true"], false).expect("exec");
        } else {
            arena.task.create(C, &arena.ends, "").expect("create");
        }
        let (started, deleted) =
            arena.both(|task| task.start(id, exec), |task| task.delete(id, exec));
        allowed("start", &started, LOST);
        allowed("delete", &deleted, &[Code::FAILED_PRECONDITION]);
        assert!(
            started.is_ok() || deleted.is_ok(),
            "{started:?} {deleted:?}"
        );
        arena.settle(id, exec);
    }

    /// The exec is killed, or its container.
    pub fn exec_kill(arena: &mut Arena<'_>) {
        if arena.odd() {
            let exec = |task: &Task| {
                task.exec(POD, E, &["sleep", "600"], false)?;
                task.start(POD, E)
            };
            let (executed, killed) = arena.both(exec, |task| task.kill_process(POD, E, 9));
            allowed("exec", &executed, LOST);
            allowed("kill", &killed, LOST);
            if killed.is_ok() {
                assert_eq!(arena.task.wait(POD, E).expect("wait"), KILLED);
            }
            arena.settle(POD, E);
            return;
        }
        arena.running(&arena.stays);
        let exec = |task: &Task| {
            task.exec(C, E, &["sleep", "600"], false)?;
            task.start(C, E)
        };
        let (executed, killed) = arena.both(exec, |task| task.kill(C, 9));
        if let Err(error) = executed {
            // The exec's set-up may break off anywhere when its container ends.
            assert!(code_of(&error).is_some(), "{error}");
        }
        killed.expect("kill");
        assert_eq!(arena.task.wait(C, "").expect("wait"), KILLED);
        if arena.task.state(C, E).is_ok() {
            arena.task.wait(C, E).expect("wait");
        }
        arena.settle(C, E);
        arena.settle(C, "");
    }

    /// The exec is deleted, or its container.
    pub fn exec_delete(arena: &mut Arena<'_>) {
        if arena.odd() {
            let exec = |task: &Task| {
                task.exec(POD, E, &["true"], false)?;
                task.start(POD, E)
            };
            let (executed, deleted) = arena.both(exec, |task| task.delete(POD, E));
            allowed("exec", &executed, LOST);
            allowed("delete", &deleted, LOST);
            arena.settle(POD, E);
            return;
        }
        arena.running(&arena.ends);
        let exec = |task: &Task| task.exec(C, E, &["true"], false);
        let (executed, deleted) = arena.both(exec, |task| {
            task.wait(C, "")?;
            task.delete(C, "")
        });
        if let Err(error) = executed {
            assert!(code_of(&error).is_some(), "{error}");
        }
        deleted.expect("delete");
        arena.settle(C, "");
    }

    pub fn resize_exit(arena: &mut Arena<'_>) {
        let resize = |task: &Task, width: u32| {
            let request = api::ResizePtyRequest {
                id: POD.into(),
                exec_id: E.into(),
                width,
                height: 24,
                ..Default::default()
            };
            task.client().resize_pty(Task::context(), &request)
        };
        arena.task.exec(POD, E, &["true"], true).expect("exec");
        let run = |task: &Task| {
            task.start(POD, E)?;
            task.wait(POD, E)
        };
        let (ended, resized) = arena.both(run, |task| {
            (80..90).try_for_each(|width| resize(task, width).map(drop))
        });
        assert_eq!(ended.expect("wait"), 0);
        resized.expect("resize");
        arena.settle(POD, E);
    }

    pub fn delete_delete(arena: &mut Arena<'_>) {
        let (id, exec) = if arena.odd() { (POD, E) } else { (C, "") };
        if arena.odd() {
            arena.task.exec(POD, E, &["true"], false).expect("exec");
            arena.task.start(POD, E).expect("start");
        } else {
            arena.running(&arena.ends);
        }
        arena.task.wait(id, exec).expect("wait");
        let (first, second) =
            arena.both(|task| task.delete(id, exec), |task| task.delete(id, exec));
        allowed("delete", &first, &[Code::NOT_FOUND]);
        allowed("delete", &second, &[Code::NOT_FOUND]);
        assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
        arena.settle(id, exec);
    }

    /// A delete of what runs or is paused is refused; after a kill it is not.
    pub fn pause_delete(arena: &mut Arena<'_>) {
        arena.running(&arena.stays);
        let pause = |task: &Task| {
            let request = api::PauseRequest {
                id: C.into(),
                ..Default::default()
            };
            task.client().pause(Task::context(), &request)
        };
        let kills = arena.odd();
        let (paused, deleted) = arena.both(pause, |task| {
            if kills {
                task.kill(C, 9)?;
                task.wait(C, "")?;
            }
            task.delete(C, "")
        });
        allowed("pause", &paused, LOST);
        match deleted {
            Ok(status) => assert!(kills && status == KILLED),
            Err(error) => assert!(
                !kills && code_of(&error) == Some(Code::FAILED_PRECONDITION),
                "{error}"
            ),
        }
        arena.settle(C, "");
    }
}
