//! containerd's Sandbox service, beside the Task service on the same socket: a pod without a pause container.
//!
//! containerd 2 uses it where the runtime handler says `sandboxer = "shim"`. The app containers' specs then name the pod's namespaces
//! as `/proc/<pid of StartSandbox>/ns/…`; in the guest the pod's own take their place, whatever the path. They mount no
//! `/etc/resolv.conf`, `/etc/hostname`, `/etc/hosts` and `/dev/shm` of the pod, which are left to the sandbox.

use super::{TaskService, any, rpc_error, stats, status, timestamp, whole};
use crate::cgroup::CgroupPath;
use crate::machine::{Pod as PodSpec, PodSize};
use crate::sandbox::Error;
use crate::sandbox::create::check_annotations;
use crate::sandbox::events::{SandboxDescription, SandboxState};
use async_trait::async_trait;
use coffer_proto::cri::{DNSConfig, NamespaceMode, PodSandboxConfig};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{EnumOrUnknown, Message, MessageField};
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::Sandbox as SandboxApi;
use containerd_shim_protos::types::platform::Platform;
use std::collections::HashMap;
use std::fs;
use std::time::{Duration, SystemTime};
use ttrpc::r#async::TtrpcContext;

/// The type under which containerd's CRI plugin passes a pod's configuration.
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";
/// The states that containerd knows.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// Where the host asks for names, and so does a pod that is told nothing else.
const HOSTS_RESOLV_CONF: &str = "/etc/resolv.conf";

#[async_trait]
impl SandboxApi for TaskService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> ttrpc::Result<api::CreateSandboxResponse> {
        self.check(&request.sandbox_id)?;
        if !request.rootfs.is_empty() {
            return Err(status(Error::Unsupported(
                "a sandbox with a root file system of its own",
            )));
        }
        let config = pod_config(request.options.as_ref()).map_err(|message| {
            rpc_error(
                ttrpc::Code::INVALID_ARGUMENT,
                format!("CreateSandbox: {message}"),
            )
        })?;
        check_annotations(request.annotations.keys()).map_err(status)?;
        let spec = pod_spec(config, &request.sandbox_id, &request.netns_path).map_err(status)?;
        self.sandbox.prepare(spec).await.map_err(status)?;
        Ok(api::CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let sandbox = self.sandbox.clone();
        let started = whole(async move { sandbox.start_prepared().await }).await?;
        Ok(api::StartSandboxResponse {
            pid: started.pid,
            created_at: timestamp(started.created),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: api::PlatformRequest,
    ) -> ttrpc::Result<api::PlatformResponse> {
        self.check(&request.sandbox_id)?;
        // The guest's, in Go's words.
        let platform = Platform {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            ..Default::default()
        };
        Ok(api::PlatformResponse {
            platform: MessageField::some(platform),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StopSandboxRequest,
    ) -> ttrpc::Result<api::StopSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let sandbox = self.sandbox.clone();
        // Each step of a stop has a deadline of its own, and the last one needs no guest.
        whole(async move {
            sandbox.stop("stopped by its caller").await;
            Ok(())
        })
        .await?;
        Ok(api::StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::WaitSandboxRequest,
    ) -> ttrpc::Result<api::WaitSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let ended = self.sandbox.wait_stopped().await.map_err(status)?;
        Ok(api::WaitSandboxResponse {
            exit_status: ended.exit_status(),
            exited_at: ended.ended.map_or(MessageField::none(), timestamp),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: api::SandboxStatusRequest,
    ) -> ttrpc::Result<api::SandboxStatusResponse> {
        self.check(&request.sandbox_id)?;
        let known = self.sandbox.describe_sandbox().await.map_err(status)?;
        let state = if known.state == SandboxState::Running {
            READY
        } else {
            NOT_READY
        };
        let info = if request.verbose {
            self.verbose(&known)
        } else {
            HashMap::new()
        };
        Ok(api::SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: known.pid,
            state: state.to_owned(),
            info,
            created_at: timestamp(known.created),
            exited_at: known.ended.map_or(MessageField::none(), timestamp),
            ..Default::default()
        })
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::PingRequest,
    ) -> ttrpc::Result<api::PingResponse> {
        self.check(&request.sandbox_id)?;
        Ok(api::PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownSandboxRequest,
    ) -> ttrpc::Result<api::ShutdownSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let service = self.clone();
        whole(async move {
            service.sandbox.stop("shut down").await;
            service.end.notify_one();
            Ok(())
        })
        .await?;
        Ok(api::ShutdownSandboxResponse::new())
    }

    /// What all containers together use. The VM's own cost is in the host's cgroup.
    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: api::SandboxMetricsRequest,
    ) -> ttrpc::Result<api::SandboxMetricsResponse> {
        self.check(&request.sandbox_id)?;
        let figures = stats::sum(&self.sandbox.all_stats().await);
        let mut response = api::SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = timestamp(SystemTime::now());
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(any(stats::TYPE, &stats::metrics(&figures)));
        Ok(response)
    }
}

impl TaskService {
    /// One supervisor has one sandbox.
    fn check(&self, id: &str) -> ttrpc::Result<()> {
        let own = self.sandbox.options().id.as_str();
        if id == own {
            return Ok(());
        }
        Err(rpc_error(
            ttrpc::Code::NOT_FOUND,
            format!("sandbox {id:?} does not exist; this is sandbox {own}"),
        ))
    }

    fn verbose(&self, known: &SandboxDescription) -> HashMap<String, String> {
        let options = self.sandbox.options();
        let age = known.created.elapsed().unwrap_or(Duration::ZERO);
        let reason = known.state.end_reason().unwrap_or_default();
        HashMap::from([
            (
                "hypervisor".to_owned(),
                options.hypervisor.program().to_owned(),
            ),
            ("age_seconds".to_owned(), age.as_secs().to_string()),
            ("end_reason".to_owned(), reason.to_owned()),
        ])
    }
}

/// The pod's configuration; without one, as from a caller other than the CRI plugin, all of it is left at its default.
fn pod_config(options: Option<&Any>) -> Result<Option<PodSandboxConfig>, String> {
    let Some(options) = options.filter(|any| !any.type_url.is_empty()) else {
        return Ok(None);
    };
    if options.type_url.rsplit('/').next() != Some(CONFIG_TYPE) {
        return Err(format!(
            "options of type {:?} are not known; {CONFIG_TYPE} is",
            options.type_url
        ));
    }
    PodSandboxConfig::parse_from_bytes(&options.value)
        .map(Some)
        .map_err(|error| format!("the {CONFIG_TYPE} can't be parsed: {error}"))
}

fn pod_spec(config: Option<PodSandboxConfig>, id: &str, netns: &str) -> Result<PodSpec, Error> {
    let netns = (!netns.is_empty()).then(|| netns.into());
    let Some(config) = config else {
        return Ok(PodSpec {
            resolv_conf: resolv_conf(None),
            netns,
            ..Default::default()
        });
    };
    check_annotations(config.annotations.keys())?;
    let linux = config.linux.unwrap_or_default();
    let namespaces = linux
        .security_context
        .namespace_options
        .clone()
        .unwrap_or_default();
    let mode = |mode: EnumOrUnknown<NamespaceMode>| mode.enum_value_or_default();
    for (name, wanted) in [
        ("the host's network namespace for a pod", namespaces.network),
        ("the host's PID namespace for a pod", namespaces.pid),
        ("the host's IPC namespace for a pod", namespaces.ipc),
    ] {
        if mode(wanted) == NamespaceMode::NODE {
            return Err(Error::Unsupported(name));
        }
    }
    let parent = Some(linux.cgroup_parent.as_str()).filter(|parent| !parent.is_empty());
    let cgroup = parent.map(|parent| CgroupPath::in_cri_parent(parent, id));
    Ok(PodSpec {
        hostname: (!config.hostname.is_empty()).then_some(config.hostname),
        resolv_conf: resolv_conf(config.dns_config.as_ref()),
        netns,
        cgroup: cgroup.transpose()?,
        shared_pid_namespace: mode(namespaces.pid) == NamespaceMode::POD,
        size: PodSize {
            cpu_period: linux.resources.cpu_period,
            cpu_quota: linux.resources.cpu_quota,
            cpu_shares: linux.resources.cpu_shares,
            memory_limit_in_bytes: linux.resources.memory_limit_in_bytes,
        },
        sysctls: linux.sysctls,
        block_devices: Vec::new(),
    })
}

/// The pod's resolv.conf(5): what its configuration says, or else the host's.
fn resolv_conf(dns: Option<&DNSConfig>) -> String {
    let Some(dns) = dns else {
        return fs::read_to_string(HOSTS_RESOLV_CONF)
            .unwrap_or_else(|error| format!("# The host's can't be read: {error}.\n"));
    };
    let list = |keyword: &str, values: &[String]| match values {
        [] => String::new(),
        values => format!("{keyword} {}\n", values.join(" ")),
    };
    let servers: String = (dns.servers.iter())
        .map(|server| format!("nameserver {server}\n"))
        .collect();
    let text = list("search", &dns.searches) + &servers + &list("options", &dns.options);
    if text.is_empty() {
        "# No resolver is configured for the pod.\n".to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffer_proto::cri::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption};

    fn config(pid: NamespaceMode, network: NamespaceMode) -> PodSandboxConfig {
        let namespaces = NamespaceOption {
            pid: pid.into(),
            network: network.into(),
            ..Default::default()
        };
        let security = LinuxSandboxSecurityContext {
            namespace_options: MessageField::some(namespaces),
            ..Default::default()
        };
        let linux = LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/pod1".into(),
            security_context: MessageField::some(security),
            sysctls: HashMap::from([("net.core.somaxconn".to_owned(), "99".to_owned())]),
            ..Default::default()
        };
        PodSandboxConfig {
            hostname: "web".into(),
            linux: MessageField::some(linux),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_is_what_its_configuration_says() {
        let spec = pod_spec(
            Some(config(NamespaceMode::POD, NamespaceMode::POD)),
            "p",
            "/run/netns/p",
        )
        .unwrap();
        assert_eq!(spec.hostname.as_deref(), Some("web"));
        assert_eq!(spec.netns, Some("/run/netns/p".into()));
        assert_eq!(spec.cgroup, CgroupPath::parse("/kubepods/pod1/p").ok());
        assert_eq!(spec.sysctls["net.core.somaxconn"], "99");
        assert!(spec.shared_pid_namespace);
        let own = config(NamespaceMode::CONTAINER, NamespaceMode::POD);
        assert!(!pod_spec(Some(own), "p", "").unwrap().shared_pid_namespace);
    }

    #[test]
    fn the_pods_resolver_is_what_its_configuration_says() {
        let dns = DNSConfig {
            servers: vec!["192.0.2.1".into(), "2001:db8::1".into()],
            searches: vec!["a.test".into(), "b.test".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        };
        assert_eq!(
            resolv_conf(Some(&dns)),
            "search a.test b.test\nnameserver 192.0.2.1\nnameserver 2001:db8::1\noptions ndots:5\n"
        );
        let hosts = fs::read_to_string(HOSTS_RESOLV_CONF).unwrap_or_default();
        assert!(resolv_conf(None).contains(&hosts));
        assert!(!resolv_conf(Some(&DNSConfig::new())).is_empty());
    }

    #[test]
    fn an_annotation_that_is_not_known_is_refused() {
        let mut annotated = config(NamespaceMode::POD, NamespaceMode::POD);
        let name = "io.coffer.nonsense".to_owned();
        annotated.annotations.insert(name.clone(), "1".into());
        let error = pod_spec(Some(annotated), "p", "").unwrap_err();
        assert!(error.to_string().contains(&name), "{error}");
    }

    #[test]
    fn namespaces_of_the_host_are_refused_by_name() {
        let host = config(NamespaceMode::CONTAINER, NamespaceMode::NODE);
        let error = pod_spec(Some(host), "p", "").unwrap_err();
        assert!(error.to_string().contains("network namespace"), "{error}");
    }

    /// The bytes that containerd's CRI plugin sends, with fields that are skipped here.
    #[test]
    fn other_fields_of_the_configuration_are_skipped() {
        let bytes =
            b"\x0a\x05\x0a\x03web\x12\x04host\x1a\x04/log\x42\x09\x0a\x02/k\x12\x03\x0a\x01\x10";
        assert!(
            PodSandboxConfig::parse_from_bytes(bytes).is_err(),
            "cut off"
        );
        let bytes = b"\x0a\x05\x0a\x03web\x12\x04host\x1a\x04/log\x42\x0a\x0a\x02/k\x12\x04\x0a\x02\x10\x01";
        let any = |type_url: &str| Any {
            type_url: type_url.into(),
            value: bytes.to_vec(),
            ..Default::default()
        };
        let config = pod_config(Some(&any(CONFIG_TYPE))).unwrap().unwrap();
        assert_eq!(
            (
                config.hostname.as_str(),
                config.linux.cgroup_parent.as_str()
            ),
            ("host", "/k")
        );
        assert!(
            pod_config(Some(&any("x.PodSandboxConfig")))
                .unwrap_err()
                .contains("x.PodSandboxConfig")
        );
        assert_eq!(pod_config(None).unwrap(), None);
    }
}
