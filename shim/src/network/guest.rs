//! What the guest's interface must look like to stand for the pod's.

use super::{NetworkError, mac_of, name_of, netlink};
use coffer_proto::agent;
use futures::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Reads everything of one interface that its guest twin needs.
pub(super) async fn describe(
    handle: &Handle,
    link: &LinkMessage,
) -> Result<agent::Interface, NetworkError> {
    let (index, name) = (link.header.index, name_of(link));
    let mtu = |a: &LinkAttribute| {
        if let LinkAttribute::Mtu(mtu) = a {
            Some(*mtu)
        } else {
            None
        }
    };
    Ok(agent::Interface {
        mac: mac_of(link).map(|byte| format!("{byte:02x}")).join(":"),
        mtu: link.attributes.iter().find_map(mtu).unwrap_or(1500),
        addresses: addresses(handle, index, &name).await?,
        routes: routes(handle, index, &name).await?,
        neighbours: neighbours(handle, index, &name).await?,
        down: !link.header.flags.contains(LinkFlags::Up),
        name,
        ..Default::default()
    })
}

async fn addresses(
    handle: &Handle,
    index: u32,
    name: &str,
) -> Result<Vec<agent::Address>, NetworkError> {
    let found = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute();
    let found: Vec<AddressMessage> = found
        .try_collect()
        .await
        .map_err(netlink(format!("list the addresses of {name}")))?;
    // The guest makes its own link-local address, from the same MAC.
    let wanted = found
        .iter()
        .filter(|a| a.header.family == AddressFamily::Inet || a.header.scope != AddressScope::Link);
    Ok(wanted.filter_map(address).collect())
}

fn address(message: &AddressMessage) -> Option<agent::Address> {
    // IFA_LOCAL is the interface's own address where IFA_ADDRESS is a peer's (rtnetlink(7)).
    let local = |a: &AddressAttribute| {
        if let AddressAttribute::Local(ip) = a {
            Some(*ip)
        } else {
            None
        }
    };
    let plain = |a: &AddressAttribute| {
        if let AddressAttribute::Address(ip) = a {
            Some(*ip)
        } else {
            None
        }
    };
    let broadcast = |a: &AddressAttribute| {
        if let AddressAttribute::Broadcast(ip) = a {
            Some(*ip)
        } else {
            None
        }
    };
    let attributes = &message.attributes;
    let ip = attributes
        .iter()
        .find_map(local)
        .or_else(|| attributes.iter().find_map(plain))?;
    Some(agent::Address {
        ip: ip.to_string(),
        prefix: message.header.prefix_len.into(),
        broadcast: attributes
            .iter()
            .find_map(broadcast)
            .map(|ip| ip.to_string())
            .unwrap_or_default(),
        ..Default::default()
    })
}

async fn routes(
    handle: &Handle,
    index: u32,
    name: &str,
) -> Result<Vec<agent::Route>, NetworkError> {
    let mut routes = Vec::new();
    let queries = [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ];
    for query in queries {
        let found = handle.route().get(query).execute();
        let found: Vec<RouteMessage> = found
            .try_collect()
            .await
            .map_err(netlink(format!("list the routes of {name}")))?;
        routes.extend(found.iter().filter_map(|message| route(message, index)));
    }
    // A gateway has to be reachable before a route names it.
    routes.sort_by_key(|route| !route.gateway.is_empty());
    Ok(routes)
}

/// A route of the main table through the interface, unless the kernel makes it by itself from an address.
fn route(message: &RouteMessage, index: u32) -> Option<agent::Route> {
    let header = &message.header;
    let through = |a: &RouteAttribute| matches!(a, RouteAttribute::Oif(oif) if *oif == index);
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
        || header.protocol == RouteProtocol::Kernel
        || !message.attributes.iter().any(through)
    {
        return None;
    }
    let mut route = agent::Route {
        family: if header.address_family == AddressFamily::Inet6 {
            6
        } else {
            4
        },
        scope: u8::from(header.scope).into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                route.destination = format!("{}/{}", ip_of(to)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(ip) => route.gateway = ip_of(ip)?.to_string(),
            RouteAttribute::PrefSource(ip) => route.source = ip_of(ip)?.to_string(),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                let mtu = |m: &RouteMetric| {
                    if let RouteMetric::Mtu(mtu) = m {
                        Some(*mtu)
                    } else {
                        None
                    }
                };
                route.mtu = metrics.iter().find_map(mtu).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(route)
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// Only entries that somebody set for good; the rest the guest learns.
async fn neighbours(
    handle: &Handle,
    index: u32,
    name: &str,
) -> Result<Vec<agent::Neighbour>, NetworkError> {
    let found: Vec<_> = handle
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(netlink(format!("list the neighbours of {name}")))?;
    let permanent = found
        .into_iter()
        .filter(|n| n.header.ifindex == index && n.header.state == NeighbourState::Permanent);
    Ok(permanent
        .filter_map(|n| {
            let mut neighbour = agent::Neighbour {
                state: u16::from(NeighbourState::Permanent).into(),
                ..Default::default()
            };
            for attribute in &n.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                        neighbour.ip = ip.to_string();
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                        neighbour.ip = ip.to_string();
                    }
                    NeighbourAttribute::LinkLayerAddress(mac) => {
                        neighbour.mac = mac
                            .iter()
                            .map(|byte| format!("{byte:02x}"))
                            .collect::<Vec<_>>()
                            .join(":");
                    }
                    _ => {}
                }
            }
            (!neighbour.ip.is_empty() && !neighbour.mac.is_empty()).then_some(neighbour)
        })
        .collect())
}
