//! The guest's interfaces by rtnetlink: the host's names, addresses, routes and neighbours for the cards the VMM gives.
//!
//! A card is known by its MAC address only. It may still be on its way when the request comes (the tap of a pod can
//! be attached late), so it is awaited. Configuring a card again replaces what it had.

use coffer_proto::agent;
use futures::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::net::{IpAddr, Ipv4Addr};
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
    #[error("can't open a netlink socket")]
    Socket(#[source] std::io::Error),
    #[error("can't {action}")]
    Netlink {
        action: String,
        #[source]
        cause: rtnetlink::Error,
    },
}

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac([u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An interface as it shall be: the request, checked.
#[derive(Debug, PartialEq, Eq)]
pub struct Interface {
    mac: Mac,
    name: String,
    mtu: Option<u32>,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<(IpAddr, Mac, u16)>,
    up: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Address {
    ip: IpAddr,
    prefix: u8,
    broadcast: Option<Ipv4Addr>,
}

#[derive(Debug, PartialEq, Eq)]
struct Route {
    destination: (IpAddr, u8),
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    scope: u8,
    metric: Option<u32>,
    onlink: bool,
    mtu: Option<u32>,
}

impl TryFrom<&agent::Interface> for Interface {
    type Error = NetworkError;

    fn try_from(wire: &agent::Interface) -> Result<Self, NetworkError> {
        // IFNAMSIZ counts the closing zero. The kernel refuses the same names.
        let name_fits =
            (1..16).contains(&wire.name.len()) && ![".", ".."].contains(&wire.name.as_str());
        if !name_fits
            || wire
                .name
                .bytes()
                .any(|b| !b.is_ascii_graphic() || b"/:%".contains(&b))
        {
            return Err(invalid("interface name", &wire.name));
        }
        let neighbour = |wire: &agent::Neighbour| {
            let state =
                u16::try_from(wire.state).map_err(|_| invalid("neighbour state", wire.state))?;
            Ok((parse("neighbour", &wire.ip)?, parse_mac(&wire.mac)?, state))
        };
        Ok(Self {
            mac: parse_mac(&wire.mac)?,
            name: wire.name.clone(),
            mtu: given(wire.mtu),
            addresses: wire
                .addresses
                .iter()
                .map(Address::try_from)
                .collect::<Result<_, _>>()?,
            routes: wire
                .routes
                .iter()
                .map(Route::try_from)
                .collect::<Result<_, _>>()?,
            neighbours: wire
                .neighbours
                .iter()
                .map(neighbour)
                .collect::<Result<_, _>>()?,
            up: !wire.down,
        })
    }
}

impl TryFrom<&agent::Address> for Address {
    type Error = NetworkError;

    fn try_from(wire: &agent::Address) -> Result<Self, NetworkError> {
        let ip = parse("address", &wire.ip)?;
        let prefix = u8::try_from(wire.prefix)
            .ok()
            .filter(|prefix| *prefix <= longest_prefix(ip));
        let broadcast = parse_optional("broadcast address", &wire.broadcast)?;
        Ok(Self {
            ip,
            prefix: prefix.ok_or_else(|| invalid("prefix length", wire.prefix))?,
            broadcast,
        })
    }
}

impl TryFrom<&agent::Route> for Route {
    type Error = NetworkError;

    fn try_from(wire: &agent::Route) -> Result<Self, NetworkError> {
        let gateway: Option<IpAddr> = parse_optional("gateway", &wire.gateway)?;
        let destination = match (wire.destination.as_str(), wire.family) {
            ("", 4) => (IpAddr::from([0; 4]), 0),
            ("", 6) => (IpAddr::from([0; 16]), 0),
            ("", family) => return Err(invalid("route family", family)),
            (text, _) => parse_network(text)?,
        };
        Ok(Self {
            destination,
            gateway,
            source: parse_optional("route source", &wire.source)?,
            scope: u8::try_from(wire.scope).map_err(|_| invalid("route scope", wire.scope))?,
            metric: given(wire.metric),
            onlink: wire.onlink,
            mtu: given(wire.mtu),
        })
    }
}

fn invalid(field: &'static str, value: impl ToString) -> NetworkError {
    NetworkError::Invalid {
        field,
        value: value.to_string(),
    }
}

/// Zero stands for "not given".
fn given(value: u32) -> Option<u32> {
    (value != 0).then_some(value)
}

fn parse<T: std::str::FromStr>(field: &'static str, text: &str) -> Result<T, NetworkError> {
    text.parse().map_err(|_| invalid(field, text))
}

fn parse_optional<T: std::str::FromStr>(
    field: &'static str,
    text: &str,
) -> Result<Option<T>, NetworkError> {
    if text.is_empty() {
        Ok(None)
    } else {
        parse(field, text).map(Some)
    }
}

fn parse_mac(text: &str) -> Result<Mac, NetworkError> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            (part.len() == 2)
                .then(|| u8::from_str_radix(part, 16).ok())
                .flatten()
        })
        .collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .map(Mac)
        .ok_or_else(|| invalid("MAC address", text))
}

fn parse_network(text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let (ip, prefix) = text
        .split_once('/')
        .ok_or_else(|| invalid("route destination", text))?;
    let ip = ip.parse().map_err(|_| invalid("route destination", text))?;
    match prefix.parse() {
        Ok(prefix) if prefix <= longest_prefix(ip) => Ok((ip, prefix)),
        _ => Err(invalid("route destination", text)),
    }
}

fn longest_prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// Brings `lo` up; the kernel gives it its addresses then.
pub async fn bring_loopback_up() -> Result<(), NetworkError> {
    const LOOPBACK_INDEX: u32 = 1;
    let handle = open()?;
    let up = LinkUnspec::new_with_index(LOOPBACK_INDEX).up().build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(because("bring lo up"))
}

/// Gives a card the name, addresses, routes and neighbours of `interface`, and takes from it all others.
pub async fn configure(interface: &Interface) -> Result<(), NetworkError> {
    let handle = open()?;
    let (index, old_name) = find_card(&handle, interface.mac).await?;
    let name = &interface.name;

    // Only an interface that is down can get another name; down, it also loses its routes.
    let link = LinkUnspec::new_with_index(index).down().build();
    handle
        .link()
        .set(link)
        .execute()
        .await
        .map_err(because(format!("take {old_name} down")))?;
    flush_addresses(&handle, index).await?;
    let mut link = LinkUnspec::new_with_index(index).name(name.as_str());
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
    // A gateway must be reachable when its route comes, so routes on the link go first.
    let (behind_gateway, on_link): (Vec<_>, Vec<_>) =
        interface.routes.iter().partition(|r| r.gateway.is_some());
    for route in on_link.into_iter().chain(behind_gateway) {
        add_route(&handle, index, route).await?;
    }
    for (ip, mac, state) in &interface.neighbours {
        let request = handle
            .neighbours()
            .add(index, *ip)
            .link_layer_address(&mac.0)
            .replace();
        let request = if *state == 0 {
            request
        } else {
            request.state((*state).into())
        };
        request
            .execute()
            .await
            .map_err(because(format!("add neighbour {ip}")))?;
    }
    Ok(())
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

async fn find_card(handle: &Handle, mac: Mac) -> Result<(u32, String), NetworkError> {
    let end = Instant::now() + CARD_DEADLINE;
    loop {
        let links: Vec<LinkMessage> = handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(because("list the interfaces"))?;
        let found = links.iter().find(|link| {
            link.attributes
                .iter()
                .any(|a| matches!(a, LinkAttribute::Address(address) if address[..] == mac.0))
        });
        if let Some(link) = found {
            let name = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                });
            return Ok((link.header.index, name.unwrap_or_default()));
        }
        if Instant::now() >= end {
            return Err(NetworkError::NoCard(mac));
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
        // The host's network has checked the address; detecting duplicates would delay its use by a second.
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

async fn add_route(handle: &Handle, index: u32, route: &Route) -> Result<(), NetworkError> {
    let request = handle.route().add(route_message(index, route)).replace();
    let (ip, prefix) = route.destination;
    let via = route
        .gateway
        .map(|gateway| format!(" via {gateway}"))
        .unwrap_or_default();
    request
        .execute()
        .await
        .map_err(because(format!("add route {ip}/{prefix}{via}")))
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

    fn wire() -> agent::Interface {
        agent::Interface {
            mac: "02:00:00:00:00:0A".into(),
            name: "eth0".into(),
            ..Default::default()
        }
    }

    #[test]
    fn addresses_and_routes_are_parsed() {
        let mut wire = wire();
        wire.addresses = vec![agent::Address {
            ip: "10.0.0.2".into(),
            prefix: 24,
            ..Default::default()
        }];
        wire.routes = vec![
            agent::Route {
                family: 6,
                gateway: "fe80::1".into(),
                ..Default::default()
            },
            agent::Route {
                destination: "10.1.0.0/16".into(),
                scope: 253,
                metric: 7,
                ..Default::default()
            },
        ];
        let interface = Interface::try_from(&wire).unwrap();
        assert_eq!(interface.mac.to_string(), "02:00:00:00:00:0a");
        assert_eq!(interface.addresses[0].prefix, 24);
        assert_eq!(interface.routes[0].destination, ("::".parse().unwrap(), 0));
        assert_eq!(interface.routes[1].metric, Some(7));
        assert!(interface.up);
        let message = route_message(2, &interface.routes[1]);
        assert_eq!(message.header.scope, RouteScope::Link);
        assert!(message.attributes.contains(&RouteAttribute::Oif(2)));
    }

    #[test]
    fn what_is_not_an_interface_is_refused_by_name() {
        let refused = |change: fn(&mut agent::Interface)| {
            let mut wire = wire();
            change(&mut wire);
            Interface::try_from(&wire).unwrap_err().to_string()
        };
        assert!(refused(|w| w.mac = "02:00:00:00:00".into()).contains("02:00:00:00:00"));
        assert!(refused(|w| w.mac = "+2:00:00:00:00:00".into()).contains("MAC"));
        assert!(refused(|w| w.name = "../eth0".into()).contains("../eth0"));
        assert!(refused(|w| w.name = "sixteen-and-more".into()).contains("sixteen-and-more"));
        let route = |destination: &str| agent::Route {
            destination: destination.into(),
            ..Default::default()
        };
        for bad in ["10.0.0.0", "10.0.0.0/33", "fd00::/129", "x/8"] {
            let mut wire = wire();
            wire.routes = vec![route(bad)];
            assert!(
                Interface::try_from(&wire)
                    .unwrap_err()
                    .to_string()
                    .contains(bad)
            );
        }
        assert!(refused(|w| w.routes = vec![agent::Route::default()]).contains("family"));
    }
}
