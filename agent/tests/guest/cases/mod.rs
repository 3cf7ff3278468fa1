//! The cases, by what they are about.

use crate::fixture::Guest;

mod exec;
mod files;
mod identity;
mod isolation;
mod lifecycle;
mod limits;

pub type Case = fn(&Guest) -> anyhow::Result<()>;

macro_rules! cases {
    ($($module:ident: $($name:ident),+;)+) => {
        /// Every case with its name.
        pub const ALL: &[(&str, Case)] = &[
            $($((concat!(stringify!($module), "::", stringify!($name)), $module::$name),)+)+
        ];
    };
}

cases! {
    exec: exec_has_its_own_process_block, twenty_execs_at_once, exec_after_the_end, exec_on_chosen_cpus, exec_terminal,
        streams_are_all_that_is_open;
    lifecycle: exit_codes, programs_that_cannot_run, create_waits_for_start, unwanted_processes_end,
        delete_is_idempotent, failures_leave_nothing, pause_and_resume, execs_meet_pauses, hooks_run, hooks_that_fail, eighty_creates_at_once,
        kill_at_any_moment, terminal, nothing_is_left;
    isolation: pid_namespace, shared_pid_namespace, pid_namespace_of_a_container, pod_namespaces, own_host_name, cgroup_namespace,
        time_namespace, user_namespace, sysctls_of_the_pod, session_keyring;
    files: mounts_of_the_spec, mount_options, bind_mounts, recursive_read_only, tmpcopyup, masked_and_read_only,
        read_only_root, root_propagation, default_devices, devices_of_the_spec, symlinks_in_the_image,
        symlinked_proc, image_without_null, swapped_symlinks, links_of_proc;
    identity: capabilities, no_capabilities, ambient_capabilities, user_and_groups, home_and_environment,
        no_new_privileges, seccomp_errno, seccomp_without_no_new_privs, seccomp_kill, seccomp_arguments, seccomp_and_new_system_calls,
        rlimits, scheduling, oom_score, personality;
    limits: memory_limit, pids_limit, cpu_and_weights, numbers_of_the_host, unified, update, device_rules, update_of_device_rules,
        statistics, nested_cgroups;
}
