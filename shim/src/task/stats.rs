//! The guest's cgroup figures as containerd's `io.containerd.cgroups.v2.Metrics`.

use coffer_proto::agent::{IoStat, StatContainerResponse};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim_protos::protobuf::MessageField;
use std::collections::HashMap;

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
