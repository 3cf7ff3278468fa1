//! The guest's cgroup figures as containerd's `io.containerd.cgroups.v2.Metrics`.

use crate::sandbox::process::Exit;
use coffer_proto::agent::{IoStat, StatContainerResponse};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim_protos::protobuf::MessageField;
use std::collections::HashMap;

/// The type under which containerd knows [`metrics`].
pub const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// What is left to say of a container whose VM is gone: whether it ended for want of memory.
pub fn of_ended(exit: &Exit) -> StatContainerResponse {
    let kills = u64::from(exit.oom_killed);
    let events = ["oom", "oom_kill"].map(|name| (name.to_owned(), kills));
    StatContainerResponse {
        memory_events: HashMap::from(events),
        memory_limit: u64::MAX,
        swap_limit: u64::MAX,
        pids_limit: u64::MAX,
        ..Default::default()
    }
}

/// What several containers use together. A limit of the sum is the sum of the limits, if each has one.
pub fn sum(all: &[StatContainerResponse]) -> StatContainerResponse {
    let mut sum = StatContainerResponse::default();
    for one in all {
        for (to, from) in [
            (&mut sum.cpu_usage_us, one.cpu_usage_us),
            (&mut sum.cpu_user_us, one.cpu_user_us),
            (&mut sum.cpu_system_us, one.cpu_system_us),
            (&mut sum.cpu_nr_periods, one.cpu_nr_periods),
            (&mut sum.cpu_nr_throttled, one.cpu_nr_throttled),
            (&mut sum.cpu_throttled_us, one.cpu_throttled_us),
            (&mut sum.memory_current, one.memory_current),
            (&mut sum.memory_peak, one.memory_peak),
            (&mut sum.memory_limit, one.memory_limit),
            (&mut sum.swap_current, one.swap_current),
            (&mut sum.swap_limit, one.swap_limit),
            (&mut sum.pids_current, one.pids_current),
            (&mut sum.pids_limit, one.pids_limit),
        ] {
            *to = to.saturating_add(from);
        }
        add(&mut sum.memory_stat, &one.memory_stat);
        add(&mut sum.memory_events, &one.memory_events);
        one.io.iter().for_each(|io| add_io(&mut sum.io, io));
    }
    sum
}

fn add(sum: &mut HashMap<String, u64>, one: &HashMap<String, u64>) {
    for (name, value) in one {
        let to = sum.entry(name.clone()).or_default();
        *to = to.saturating_add(*value);
    }
}

fn add_io(sum: &mut Vec<IoStat>, one: &IoStat) {
    let same = |io: &&mut IoStat| (io.major, io.minor) == (one.major, one.minor);
    let Some(to) = sum.iter_mut().find(same) else {
        return sum.push(one.clone());
    };
    for (to, from) in [
        (&mut to.rbytes, one.rbytes),
        (&mut to.wbytes, one.wbytes),
        (&mut to.rios, one.rios),
        (&mut to.wios, one.wios),
    ] {
        *to = to.saturating_add(from);
    }
}

/// All sub-messages are present: CRI-O reads them without looking.
pub fn metrics(figures: &StatContainerResponse) -> Metrics {
    let cpu = CPUStat {
        usage_usec: figures.cpu_usage_us,
        user_usec: figures.cpu_user_us,
        system_usec: figures.cpu_system_us,
        nr_periods: figures.cpu_nr_periods,
        nr_throttled: figures.cpu_nr_throttled,
        throttled_usec: figures.cpu_throttled_us,
        ..Default::default()
    };
    let pids = PidsStat {
        current: figures.pids_current,
        limit: figures.pids_limit,
        ..Default::default()
    };
    Metrics {
        pids: MessageField::some(pids),
        cpu: MessageField::some(cpu),
        memory: MessageField::some(memory(figures)),
        memory_events: MessageField::some(memory_events(&figures.memory_events)),
        io: MessageField::some(IOStat {
            usage: figures.io.iter().map(io_entry).collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn memory(figures: &StatContainerResponse) -> MemoryStat {
    let of = |name: &str| figures.memory_stat.get(name).copied().unwrap_or_default();
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: of("workingset_refault"),
        workingset_activate: of("workingset_activate"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: figures.memory_current,
        usage_limit: figures.memory_limit,
        swap_usage: figures.swap_current,
        swap_limit: figures.swap_limit,
        max_usage: figures.memory_peak,
        ..Default::default()
    }
}

fn memory_events(events: &HashMap<String, u64>) -> MemoryEvents {
    let of = |name: &str| events.get(name).copied().unwrap_or_default();
    MemoryEvents {
        low: of("low"),
        high: of("high"),
        max: of("max"),
        oom: of("oom"),
        oom_kill: of("oom_kill"),
        oom_group_kill: of("oom_group_kill"),
        ..Default::default()
    }
}

fn io_entry(io: &IoStat) -> IOEntry {
    IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn an_end_for_want_of_memory_is_told_after_the_guest_is_gone() {
        let exit = Exit {
            status: 137,
            at: SystemTime::now(),
            reason: None,
            oom_killed: true,
        };
        let told = metrics(&of_ended(&exit));
        assert_eq!(told.memory_events.oom_kill, 1);
        // CRI-O reads these without looking whether they are there.
        assert!(told.cpu.is_some() && told.memory.is_some() && told.pids.is_some());
        let fine = Exit {
            oom_killed: false,
            ..exit
        };
        assert_eq!(metrics(&of_ended(&fine)).memory_events.oom_kill, 0);
    }

    #[test]
    fn a_pod_uses_what_its_containers_use() {
        let one = StatContainerResponse {
            cpu_usage_us: 5,
            memory_limit: u64::MAX,
            memory_stat: HashMap::from([("anon".to_owned(), 7)]),
            io: vec![IoStat {
                major: 254,
                rbytes: 1,
                ..Default::default()
            }],
            ..Default::default()
        };
        let all = sum(&[one.clone(), one]);
        assert_eq!((all.cpu_usage_us, all.memory_limit), (10, u64::MAX));
        assert_eq!(all.memory_stat["anon"], 14);
        assert_eq!((all.io.len(), all.io[0].rbytes), (1, 2));
    }
}
