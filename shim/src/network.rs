//! The pod's network, carried into the VM.
//!
//! A CNI plugin, docker or podman has wired a network namespace for the pod: interfaces with addresses, routes and neighbours. The
//! guest takes their place. Each interface gets a tap beside it, and traffic control redirects every frame between the two:
//!
//! ```text
//!        pod's netns on the host                         guest
//!  peer ══ eth0 ── ingress: redirect ──► cfr2 (tap) ══ virtio-net eth0: same MAC, MTU, addresses, routes
//!          eth0 ◄── redirect :ingress ── cfr2
//! ```
//!
//! Frames are redirected before the host's stack sees them, so the addresses can stay where the plugin put them. All
//! netlink work happens on a thread of its own that entered the namespace; the tap's fd then works from everywhere.

mod forward;
mod guest;
mod lookup;
mod namespace;
mod resolver;
mod tap;
mod watch;

pub use forward::{PortForward, probe as probe_port_forward};
pub use namespace::NamespaceId;
pub use resolver::DockersNames;
pub use watch::watch;

use coffer_proto::agent;
use futures::TryStreamExt;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::tc::TcHandle;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{Handle, LinkUnspec};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Names of our taps begin so; interfaces that do are not the pod's.
const TAP_PREFIX: &str = "cfr";

/// Why the network could not be carried.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("can't find the network namespace {path}")]
    Find { path: PathBuf, source: io::Error },
    #[error("the network namespace {path} is the host's, which can't be had in a VM")]
    Host { path: PathBuf },
    #[error("can't enter the network namespace {path}")]
    Enter { path: PathBuf, source: io::Error },
    #[error("can't open a netlink socket")]
    Socket(#[source] io::Error),
    #[error("can't {what}")]
    Netlink {
        what: String,
        source: rtnetlink::Error,
    },
    #[error("can't create the tap {name}")]
    Tap { name: String, source: io::Error },
    #[error("the network thread ended early")]
    Thread,
}

fn netlink<'a>(what: impl Into<String> + 'a) -> impl FnOnce(rtnetlink::Error) -> NetworkError + 'a {
    move |source| NetworkError::Netlink {
        what: what.into(),
        source,
    }
}

/// Names an interface within its namespace for good, whatever it is called (`ifindex`, netdevice(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IfIndex(pub u32);

/// One interface of the pod and the tap that stands for it.
#[derive(Debug)]
pub struct Nic {
    pub index: IfIndex,
    /// Opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR. It vanishes when its last holder closes it.
    pub tap: OwnedFd,
    /// What the agent has to set up.
    pub interface: agent::Interface,
}

/// Makes a tap for each interface of the namespace that is not in `known`, `room` of them at most, and redirects its traffic.
/// On an error nothing stays behind.
pub async fn attach(
    netns: &Path,
    known: &[IfIndex],
    room: usize,
) -> Result<Vec<Nic>, NetworkError> {
    let known = known.to_vec();
    within(netns, move |handle| async move {
        let mut links = pod_links(&handle).await?;
        links.retain(|link| !known.contains(&index_of(link)));
        links.truncate(room);
        let nics = attach_links(&handle, &links).await;
        if nics.is_err() {
            // The taps are closed already; what may be left are the ingress qdiscs of these interfaces.
            for link in &links {
                drop_ingress(&handle, link.header.index).await;
            }
        }
        nics
    })
    .await
}

/// What the guest's twins of the namespace's interfaces should look like now.
pub async fn describe(netns: &Path) -> Result<Vec<(IfIndex, agent::Interface)>, NetworkError> {
    within(netns, |handle| async move {
        let mut interfaces = Vec::new();
        for link in pod_links(&handle).await? {
            interfaces.push((index_of(&link), guest::describe(&handle, &link).await?));
        }
        Ok(interfaces)
    })
    .await
}

/// Undoes the redirection of all interfaces. A namespace that is gone is no error.
pub async fn detach(netns: &Path) -> Result<(), NetworkError> {
    if !netns.exists() {
        return Ok(());
    }
    within(netns, |handle| async move {
        for link in pod_links(&handle).await? {
            drop_ingress(&handle, link.header.index).await;
        }
        Ok(())
    })
    .await
}

async fn attach_links(handle: &Handle, links: &[LinkMessage]) -> Result<Vec<Nic>, NetworkError> {
    let mut nics = Vec::new();
    for link in links {
        nics.push(attach_link(handle, link).await?);
    }
    Ok(nics)
}

async fn attach_link(handle: &Handle, link: &LinkMessage) -> Result<Nic, NetworkError> {
    let (host_name, index) = (name_of(link), link.header.index);
    let interface = guest::describe(handle, link).await?;
    let tap_name = format!("{TAP_PREFIX}{index}");
    let tap = tap::open(&tap_name)?;
    let mut made = handle.link().get().match_name(tap_name.clone()).execute();
    let made = made
        .try_next()
        .await
        .map_err(netlink(format!("find the tap {tap_name}")))?;
    let tap_index = made.map_or(0, |tap| tap.header.index);
    let up = LinkUnspec::new_with_index(tap_index)
        .mtu(interface.mtu)
        .up()
        .build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(netlink(format!("set up the tap {tap_name}")))?;
    redirect(handle, index, tap_index, &host_name).await?;
    redirect(handle, tap_index, index, &tap_name).await?;
    Ok(Nic {
        index: index_of(link),
        tap,
        interface,
    })
}

/// Sends every frame that comes in on `from` out of `to`.
async fn redirect(handle: &Handle, from: u32, to: u32, name: &str) -> Result<(), NetworkError> {
    let index = i32::try_from(from).map_err(|_| NetworkError::Thread)?;
    let what = format!("redirect the frames of {name}");
    // A leftover of a sandbox that crashed here would be in the way.
    drop_ingress(handle, from).await;
    handle
        .qdisc()
        .add(index)
        .ingress()
        .execute()
        .await
        .map_err(netlink(what.clone()))?;
    let filter = handle
        .traffic_filter(index)
        .add()
        .parent(0xffff_0000)
        .protocol(0x0003_u16.to_be());
    filter
        .redirect(to)
        .map_err(netlink(what.clone()))?
        .execute()
        .await
        .map_err(netlink(what))
}

/// Removes the ingress qdisc with its filters. An interface that has none is what is wanted, so no error is one.
async fn drop_ingress(handle: &Handle, index: u32) {
    let Ok(index) = i32::try_from(index) else {
        return;
    };
    let mut request = handle.qdisc().del(index);
    request.message_mut().header.parent = TcHandle::INGRESS;
    if let Err(error) = request.execute().await {
        tracing::trace!(index, %error, "no ingress qdisc to remove");
    }
}

/// The pod's interfaces: all but loopback and our taps, in the order of their index.
async fn pod_links(handle: &Handle) -> Result<Vec<LinkMessage>, NetworkError> {
    let all: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(netlink("list the interfaces"))?;
    let mut links: Vec<_> = all
        .into_iter()
        .filter(|link| !link.header.flags.contains(LinkFlags::Loopback))
        .filter(|link| !name_of(link).starts_with(TAP_PREFIX) && mac_of(link) != [0; 6])
        .collect();
    links.sort_by_key(|link| link.header.index);
    Ok(links)
}

fn index_of(link: &LinkMessage) -> IfIndex {
    IfIndex(link.header.index)
}

fn name_of(link: &LinkMessage) -> String {
    let name = |a: &LinkAttribute| {
        if let LinkAttribute::IfName(name) = a {
            Some(name.clone())
        } else {
            None
        }
    };
    link.attributes.iter().find_map(name).unwrap_or_default()
}

fn mac_of(link: &LinkMessage) -> [u8; 6] {
    let mac = |a: &LinkAttribute| {
        if let LinkAttribute::Address(mac) = a {
            <[u8; 6]>::try_from(&mac[..]).ok()
        } else {
            None
        }
    };
    link.attributes.iter().find_map(mac).unwrap_or_default()
}

/// Runs netlink work on a thread that has entered the namespace, and ends with it.
async fn within<T, W, F>(netns: &Path, work: W) -> Result<T, NetworkError>
where
    T: Send + 'static,
    W: FnOnce(Handle) -> F + Send + 'static,
    F: Future<Output = Result<T, NetworkError>>,
{
    in_netns(netns, move |_| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(NetworkError::Socket)?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(NetworkError::Socket)?;
            tokio::spawn(connection);
            work(handle).await
        })
    })
    .await?
}

/// Runs blocking work on a thread that has entered the namespace, and ends with it. The work gets the namespace's file.
async fn in_netns<T, W>(netns: &Path, work: W) -> Result<T, NetworkError>
where
    T: Send + 'static,
    W: FnOnce(&File) -> T + Send + 'static,
{
    let path = netns.to_owned();
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = done.send(enter(&path).map(|file| work(&file)));
    });
    result.await.map_err(|_| NetworkError::Thread)?
}

/// Moves the calling thread into a network namespace, for good.
fn enter(path: &Path) -> Result<File, NetworkError> {
    let fail = |source| NetworkError::Enter {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(fail)?;
    setns(&file, CloneFlags::CLONE_NEWNET).map_err(|e| fail(e.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests;
