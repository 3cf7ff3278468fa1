//! What an interface shall be: the shim's request, checked.

use super::NetworkError;
use coffer_proto::agent;
use std::net::{IpAddr, Ipv4Addr};

/// What the shim asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    Set(Interface),
    /// The interface on the card that booted with this address is gone.
    Gone(Mac),
}

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An interface as it shall be.
#[derive(Debug, PartialEq, Eq)]
pub struct Interface {
    pub mac: Mac,
    /// The address with which its card booted.
    pub found_by: Mac,
    pub name: String,
    pub mtu: Option<u32>,
    pub addresses: Vec<Address>,
    pub routes: Vec<Route>,
    pub neighbours: Vec<Neighbour>,
    pub up: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Address {
    pub ip: IpAddr,
    /// In bits.
    pub prefix: u8,
    pub broadcast: Option<Ipv4Addr>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Route {
    /// Address and prefix length; of length 0 for the default route.
    pub destination: (IpAddr, u8),
    pub gateway: Option<IpAddr>,
    pub source: Option<IpAddr>,
    /// RT_SCOPE_*
    pub scope: u8,
    pub metric: Option<u32>,
    pub onlink: bool,
    pub mtu: Option<u32>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub ip: IpAddr,
    pub mac: Mac,
    /// NUD_*; None for an entry that stays.
    pub state: Option<u16>,
}

impl TryFrom<&agent::Interface> for Change {
    type Error = NetworkError;

    fn try_from(wire: &agent::Interface) -> Result<Self, NetworkError> {
        if wire.gone {
            Ok(Self::Gone(parse_mac(&wire.found_by)?))
        } else {
            wire.try_into().map(Self::Set)
        }
    }
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
        Ok(Self {
            mac: parse_mac(&wire.mac)?,
            found_by: parse_mac(if wire.found_by.is_empty() {
                &wire.mac
            } else {
                &wire.found_by
            })?,
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
                .map(Neighbour::try_from)
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
            prefix: prefix.ok_or_else(|| invalid("prefix length", &wire.prefix))?,
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
            ("", family) => return Err(invalid("route family", &family)),
            (text, _) => parse_network(text)?,
        };
        Ok(Self {
            destination,
            gateway,
            source: parse_optional("route source", &wire.source)?,
            scope: u8::try_from(wire.scope).map_err(|_| invalid("route scope", &wire.scope))?,
            metric: given(wire.metric),
            onlink: wire.onlink,
            mtu: given(wire.mtu),
        })
    }
}

impl TryFrom<&agent::Neighbour> for Neighbour {
    type Error = NetworkError;

    fn try_from(wire: &agent::Neighbour) -> Result<Self, NetworkError> {
        let state =
            u16::try_from(wire.state).map_err(|_| invalid("neighbour state", &wire.state))?;
        Ok(Self {
            ip: parse("neighbour", &wire.ip)?,
            mac: parse_mac(&wire.mac)?,
            state: (state != 0).then_some(state),
        })
    }
}

fn invalid(field: &'static str, value: &(impl ToString + ?Sized)) -> NetworkError {
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

pub(super) fn parse_mac(text: &str) -> Result<Mac, NetworkError> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            (part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit())).then_some(part)
        })
        .map(|part| part.and_then(|part| u8::from_str_radix(part, 16).ok()))
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
