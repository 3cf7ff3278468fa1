//! `coffer events`: what a container uses, in runc's form, which Go programs parse (go-runc's `Event` and `Stats`).

use super::Error;
use super::lifecycle::{Known, NOT_RUNNING};
use super::options::EventsOptions;
use crate::config::Config;
use containerd_shim_protos::cgroups_v2::metrics::{IOEntry, Metrics};
use serde_json::{Value, json};
use std::io::{self, Write};

const NS_PER_US: u64 = 1000;

/// Prints a line at once or again and again, until the container has ended.
pub(super) async fn events(config: &Config, options: &EventsOptions) -> Result<(), Error> {
    let known = Known::look(config, &options.target.id).await?;
    let task = known.task_in(&["created", "running", "paused"], NOT_RUNNING)?;
    let id = &known.process.container;
    let ended = task.wait(&known.process);
    tokio::pin!(ended);
    let mut ticks = tokio::time::interval(options.interval);
    let mut oom_kills = None;
    loop {
        tokio::select! {
            _ = &mut ended, if !options.stats => return Ok(()),
            _ = ticks.tick() => {}
        }
        let stats = known.told(task.stats(id).await)?;
        let kills = stats.memory_events.oom_kill;
        if oom_kills
            .replace(kills)
            .is_some_and(|before| before < kills)
            && !print(&json!({"type": "oom", "id": id}))
        {
            return Ok(());
        }
        let line = json!({"type": "stats", "id": id, "data": data(&stats)});
        if !print(&line) || options.stats {
            return Ok(());
        }
    }
}

/// False when nobody reads any more.
fn print(line: &Value) -> bool {
    writeln!(io::stdout(), "{line}").is_ok()
}

fn data(stats: &Metrics) -> Value {
    let (cpu, memory, pids) = (&stats.cpu, &stats.memory, &stats.pids);
    let raw = json!({
        "anon": memory.anon, "file": memory.file, "kernel_stack": memory.kernel_stack, "slab": memory.slab,
        "sock": memory.sock, "shmem": memory.shmem, "pgfault": memory.pgfault, "pgmajfault": memory.pgmajfault,
        "inactive_anon": memory.inactive_anon, "active_anon": memory.active_anon,
        "inactive_file": memory.inactive_file, "active_file": memory.active_file,
    });
    let entry =
        |usage: u64, limit: u64| json!({"usage": usage, "limit": limit, "max": 0, "failcnt": 0});
    json!({
        "cpu": {
            "usage": {
                "total": cpu.usage_usec * NS_PER_US, "percpu": [],
                "kernel": cpu.system_usec * NS_PER_US, "user": cpu.user_usec * NS_PER_US,
            },
            "throttling": {
                "periods": cpu.nr_periods, "throttledPeriods": cpu.nr_throttled,
                "throttledTime": cpu.throttled_usec * NS_PER_US,
            },
        },
        "cpuset": {},
        "memory": {
            "cache": memory.file,
            "usage": entry(memory.usage, memory.usage_limit), "swap": entry(memory.swap_usage, memory.swap_limit),
            "kernel": entry(0, 0), "kernelTCP": entry(0, 0), "raw": raw,
        },
        "pids": {"current": pids.current, "limit": pids.limit},
        "blkio": {
            "ioServiceBytesRecursive": blkio(&stats.io.usage, |io| [io.rbytes, io.wbytes]),
            "ioServicedRecursive": blkio(&stats.io.usage, |io| [io.rios, io.wios]),
        },
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

fn blkio(usage: &[IOEntry], figures: impl Fn(&IOEntry) -> [u64; 2]) -> Value {
    let entries = usage.iter().flat_map(|io| {
        let [read, written] = figures(io);
        [("Read", read), ("Write", written)].map(
            |(op, value)| json!({"major": io.major, "minor": io.minor, "op": op, "value": value}),
        )
    });
    Value::Array(entries.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, IOStat, MemoryStat};
    use containerd_shim_protos::protobuf::MessageField;

    #[test]
    fn figures_have_runcs_names_and_units() {
        let cpu = CPUStat {
            usage_usec: 5,
            ..Default::default()
        };
        let memory = MemoryStat {
            usage: 7,
            usage_limit: 9,
            ..Default::default()
        };
        let io = IOEntry {
            major: 8,
            rbytes: 3,
            ..Default::default()
        };
        let stats = Metrics {
            cpu: MessageField::some(cpu),
            memory: MessageField::some(memory),
            io: MessageField::some(IOStat {
                usage: vec![io],
                ..Default::default()
            }),
            ..Default::default()
        };
        let data = data(&stats);
        assert_eq!(data["cpu"]["usage"]["total"], 5000);
        assert_eq!(
            (
                &data["memory"]["usage"]["usage"],
                &data["memory"]["usage"]["limit"]
            ),
            (&json!(7), &json!(9))
        );
        assert_eq!(
            data["blkio"]["ioServiceBytesRecursive"][0],
            json!({"major": 8, "minor": 0, "op": "Read", "value": 3})
        );
    }
}
