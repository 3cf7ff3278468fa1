//! The guest's interfaces by rtnetlink: the host's names, addresses, routes and neighbours for the cards the VMM gives.
//!
//! A card is known by the MAC address with which it booted: its current one is that of the pod's interface, which another
//! card may have as well. It may still be on its way when the request comes, so it is awaited. Configuring a card
//! again replaces what it had.

mod cards;
mod wanted;

pub use cards::Cards;
use wanted::{Address, Mac, Neighbour, Route};
pub use wanted::{Change, Interface};

use futures::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
};
use nix::sys::socket::{AddressFamily as SocketFamily, SockFlag, SockType, socket};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// A card that was attached shows up within milliseconds, even in an emulated guest.
const CARD_DEADLINE: Duration = Duration::from_secs(5);
const CARD_INTERVAL: Duration = Duration::from_millis(10);

/// Why an interface was not configured.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{field} {value:?} is not valid")]
    Invalid { field: &'static str, value: String },
    #[error("no network card has the MAC address {0} after {CARD_DEADLINE:?}")]
    NoCard(Mac),
    #[error("can't find, put away or bring back a network card")]
    Cards(#[source] std::io::Error),
    #[error("can't bring lo up")]
    Loopback(#[source] std::io::Error),
    #[error("can't open a netlink socket")]
    Socket(#[source] std::io::Error),
    #[error("can't {action}")]
    Netlink {
        action: String,
        #[source]
        cause: rtnetlink::Error,
    },
}

/// Brings `lo` up; the kernel gives it its addresses then. An ioctl, because at boot a netlink socket and its task cost
/// more than all that is done with them.
#[allow(unsafe_code)]
pub fn bring_loopback_up() -> Result<(), NetworkError> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(SocketFamily::Inet, SockType::Datagram, flags, None)
        .map_err(|error| NetworkError::Loopback(error.into()))?;
    let mut name = [0; libc::IFNAMSIZ];
    name[..2].copy_from_slice(&[b'l'.cast_signed(), b'o'.cast_signed()]);
    let ifru_flags = libc::c_short::try_from(libc::IFF_UP).expect("IFF_UP is 1");
    let up = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags },
    };
    // SAFETY: SIOCSIFFLAGS reads one ifreq, with the name closed by a zero, which outlives the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const up) } {
        0 => Ok(()),
        _ => Err(NetworkError::Loopback(std::io::Error::last_os_error())),
    }
}

/// Gives a card the name, addresses, routes and neighbours of `interface`, and takes from it all others.
async fn configure(interface: &Interface) -> Result<(), NetworkError> {
    let handle = open()?;
    let (index, old_name) = find_card(&handle, [interface.found_by, interface.mac]).await?;
    let name = &interface.name;
    free_name(&handle, name, index).await?;

    // The host's network has checked the addresses already; to detect duplicates would delay their use by a second.
    // A kernel without IPv6 has no such file and needs none.
    let _ = std::fs::write(
        format!("/proc/sys/net/ipv6/conf/{old_name}/accept_dad"),
        "0",
    );
    // Only an interface that is down can get another name; down, it also loses its routes.
    let link = LinkUnspec::new_with_index(index).down().build();
    handle
        .link()
        .set(link)
        .execute()
        .await
        .map_err(because(format!("take {old_name} down")))?;
    flush_addresses(&handle, index).await?;
    let mut link = LinkUnspec::new_with_index(index)
        .name(name.as_str())
        .address(interface.mac.0.to_vec());
    if let Some(mtu) = interface.mtu {
        link = link.mtu(mtu);
    }
    let link = if interface.up { link.up() } else { link };
    handle
        .link()
        .set(link.build())
        .execute()
        .await
        .map_err(because(format!("set up {old_name} as {name}")))?;

    for address in &interface.addresses {
        add_address(&handle, index, address).await?;
    }
    if interface.up {
        add_routes(&handle, index, &interface.routes).await?;
    }
    for neighbour in &interface.neighbours {
        add_neighbour(&handle, index, neighbour).await?;
    }
    Ok(())
}

/// Adds the routes, those on the link first: a gateway must be reachable when its route comes.
async fn add_routes(handle: &Handle, index: u32, routes: &[Route]) -> Result<(), NetworkError> {
    let (behind_gateway, on_link): (Vec<_>, Vec<_>) =
        routes.iter().partition(|route| route.gateway.is_some());
    for route in on_link.into_iter().chain(behind_gateway) {
        let request = handle.route().add(route_message(index, route)).replace();
        let (ip, prefix) = route.destination;
        let via = route
            .gateway
            .map(|gateway| format!(" via {gateway}"))
            .unwrap_or_default();
        request
            .execute()
            .await
            .map_err(because(format!("add route {ip}/{prefix}{via}")))?;
    }
    Ok(())
}

async fn add_neighbour(
    handle: &Handle,
    index: u32,
    neighbour: &Neighbour,
) -> Result<(), NetworkError> {
    let Neighbour { ip, mac, state } = neighbour;
    let mut request = handle
        .neighbours()
        .add(index, *ip)
        .link_layer_address(&mac.0)
        .replace();
    if let Some(state) = state {
        request = request.state((*state).into());
    }
    request
        .execute()
        .await
        .map_err(because(format!("add neighbour {ip}")))
}

fn because(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let action = action.into();
    move |cause| NetworkError::Netlink { action, cause }
}

/// Opens a netlink socket; the task that drives it ends with the handle.
fn open() -> Result<Handle, NetworkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Takes a name from another card, which will get its own when it is configured.
async fn free_name(handle: &Handle, name: &str, index: u32) -> Result<(), NetworkError> {
    let holder = links(handle)
        .await?
        .into_iter()
        .find(|link| name_of(link) == name && link.header.index != index);
    let Some(holder) = holder else { return Ok(()) };
    let other = holder.header.index;
    // Only an interface that is down can get another name.
    for change in [
        LinkUnspec::new_with_index(other).down(),
        LinkUnspec::new_with_index(other).name(format!("card{other}")),
    ] {
        let done = handle.link().set(change.build()).execute().await;
        done.map_err(because(format!("take the name {name} from a card")))?;
    }
    Ok(())
}

async fn links(handle: &Handle) -> Result<Vec<LinkMessage>, NetworkError> {
    let links = handle.link().get().execute().try_collect().await;
    links.map_err(because("list the interfaces"))
}

fn name_of(link: &LinkMessage) -> String {
    let name = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
    name.unwrap_or_default()
}

/// Waits for the card that booted with the first address, or has it, or else the second.
async fn find_card(handle: &Handle, macs: [Mac; 2]) -> Result<(u32, String), NetworkError> {
    let end = Instant::now() + CARD_DEADLINE;
    loop {
        let links = links(handle).await?;
        let has = |link: &LinkMessage, mac: Mac| {
            link.attributes.iter().any(|attribute| {
                matches!(attribute, LinkAttribute::PermAddress(address) | LinkAttribute::Address(address)
                    if address[..] == mac.0)
            })
        };
        let found = macs
            .iter()
            .find_map(|mac| links.iter().find(|link| has(link, *mac)));
        if let Some(link) = found {
            return Ok((link.header.index, name_of(link)));
        }
        if Instant::now() >= end {
            return Err(NetworkError::NoCard(macs[0]));
        }
        sleep(CARD_INTERVAL).await;
    }
}

async fn flush_addresses(handle: &Handle, index: u32) -> Result<(), NetworkError> {
    let addresses: Vec<AddressMessage> = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute()
        .try_collect()
        .await
        .map_err(because("list addresses"))?;
    for address in addresses {
        handle
            .address()
            .del(address)
            .execute()
            .await
            .map_err(because("delete an address"))?;
    }
    Ok(())
}

async fn add_address(handle: &Handle, index: u32, address: &Address) -> Result<(), NetworkError> {
    let mut request = handle
        .address()
        .add(index, address.ip, address.prefix)
        .replace();
    let message = request.message_mut();
    // The request's own guess of a broadcast address is not what the host has.
    message
        .attributes
        .retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
    message
        .attributes
        .extend(address.broadcast.map(AddressAttribute::Broadcast));
    if address.ip.is_ipv6() {
        message.header.flags |= AddressHeaderFlags::Nodad;
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
        if matches!(address.ip, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
            message.header.scope = AddressScope::Link;
        }
    }
    let Address { ip, prefix, .. } = address;
    request
        .execute()
        .await
        .map_err(because(format!("add address {ip}/{prefix}")))
}

fn route_message(index: u32, route: &Route) -> RouteMessage {
    let (destination, prefix) = route.destination;
    let mut message = RouteMessageBuilder::<IpAddr>::new()
        .output_interface(index)
        .build();
    let header = &mut message.header;
    header.address_family = if destination.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    header.destination_prefix_length = prefix;
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = RouteProtocol::Boot;
    header.scope = RouteScope::from(route.scope);
    if route.onlink {
        header
            .flags
            .insert(netlink_packet_route::route::RouteFlags::Onlink);
    }
    let attributes = &mut message.attributes;
    if prefix > 0 {
        attributes.push(RouteAttribute::Destination(destination.into()));
    }
    attributes.extend(route.gateway.map(|gateway| match gateway {
        IpAddr::V6(v6) if destination.is_ipv4() => {
            RouteAttribute::Via(netlink_packet_route::route::RouteVia::Inet6(v6))
        }
        gateway => RouteAttribute::Gateway(gateway.into()),
    }));
    attributes.extend(
        route
            .source
            .map(|source| RouteAttribute::PrefSource(source.into())),
    );
    attributes.extend(route.metric.map(RouteAttribute::Priority));
    attributes.extend(
        route
            .mtu
            .map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])),
    );
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffer_proto::agent;
    use nix::sched::{CloneFlags, unshare};
    use std::process::Command;

    const MAC: &str = "02:00:00:00:00:0a";

    fn ip(arguments: &str) -> String {
        let output = Command::new("ip")
            .args(arguments.split_whitespace())
            .output()
            .expect("iproute2");
        assert!(output.status.success(), "ip {arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `test` in a network namespace of its own, with a card that is called veth0.
    fn with_card(test: impl AsyncFnOnce() + Send + 'static) {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root");
            ip(&format!(
                "link add veth0 address {MAC} type veth peer name peer"
            ));
            ip("link set peer up");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(test());
        });
        thread.join().unwrap();
    }

    fn interface(name: &str, address: &str, gateway: &str) -> Interface {
        let ipv4 = agent::Address {
            ip: address.into(),
            prefix: 24,
            ..Default::default()
        };
        let ipv6 = agent::Address {
            ip: "fd00::2".into(),
            prefix: 64,
            ..Default::default()
        };
        let default_route = |family, gateway: &str| agent::Route {
            family,
            gateway: gateway.into(),
            metric: 7,
            ..Default::default()
        };
        let neighbour = agent::Neighbour {
            ip: gateway.into(),
            mac: "02:00:00:00:00:01".into(),
            ..Default::default()
        };
        let wire = agent::Interface {
            mac: MAC.into(),
            name: name.into(),
            mtu: 1400,
            addresses: vec![ipv4, ipv6],
            routes: vec![default_route(4, gateway), default_route(6, "fd00::1")],
            neighbours: vec![neighbour],
            ..Default::default()
        };
        Interface::try_from(&wire).unwrap()
    }

    #[test]
    fn a_card_gets_all_that_was_asked_and_loses_what_it_had() {
        with_card(async || {
            configure(&interface("eth0", "10.0.0.2", "10.0.0.1"))
                .await
                .unwrap();
            let shown = ip("address show eth0");
            assert!(
                shown.contains("mtu 1400") && shown.contains("inet 10.0.0.2/24 "),
                "{shown}"
            );
            assert!(
                shown.contains("fd00::2/64") && !shown.contains("tentative"),
                "{shown}"
            );
            assert!(ip("route").contains("default via 10.0.0.1 dev eth0 metric 7"));
            assert!(ip("-6 route").contains("default via fd00::1 dev eth0 metric 7"));
            assert!(
                ip("neighbour").contains("10.0.0.1 dev eth0 lladdr 02:00:00:00:00:01 PERMANENT")
            );

            configure(&interface("net1", "10.9.0.2", "10.9.0.1"))
                .await
                .unwrap();
            let shown = ip("address show net1");
            assert!(
                shown.contains("10.9.0.2/24") && !shown.contains("10.0.0.2"),
                "{shown}"
            );
            assert!(!ip("route").contains("10.0.0.1"));
        });
    }

    #[test]
    fn a_name_that_another_card_has_is_taken_from_it() {
        with_card(async || {
            ip("link set peer down");
            ip("link set peer name net1");
            configure(&interface("net1", "10.0.0.2", "10.0.0.1"))
                .await
                .unwrap();
            assert!(ip("link show net1").contains(MAC));
        });
    }

    #[test]
    fn what_the_kernel_refuses_is_named() {
        with_card(async || {
            let error = configure(&interface("eth0", "10.0.0.2", "192.0.2.1"))
                .await
                .unwrap_err();
            assert_eq!(error.to_string(), "can't add route 0.0.0.0/0 via 192.0.2.1");
        });
    }

    #[test]
    fn lo_comes_up() {
        with_card(async || {
            bring_loopback_up().unwrap();
            assert!(ip("address show lo").contains("127.0.0.1/8"));
        });
    }
}
