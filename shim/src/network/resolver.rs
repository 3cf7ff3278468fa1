//! Names on docker's networks: docker answers its containers' DNS queries in their network namespace, at an address of its loopback.
//!
//! The guest has a loopback of its own, on which the agent takes the queries; each is asked here again.
//!
//! ```text
//!        guest                        pod's namespace on the host
//!  container ── UDP ──► agent ═ vsock ═► query ── UDP, 127.0.0.11:53 ──► dockerd          names of containers
//!                                        query ── UDP ──► the servers that dockerd knows  all others
//! ```
//!
//! dockerd passes on what it does not know from within the namespace, where the answer would reach the guest and not dockerd. So
//! such a query goes to the same servers from the host's namespace.

use super::{NetworkError, in_netns};
use crate::io::Dialer;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UdpSocket, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

/// Where docker's resolver is in every namespace that has one.
const DOCKERS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const PORT: u16 = 53;
/// Queries under way. Of more the client hears nothing and asks again, as of any busy resolver.
const MAX_QUERIES: usize = 64;
/// dockerd knows the names of its containers at once, and asks others for the rest.
const KNOWS: Duration = Duration::from_millis(500);
/// A client asks again after five seconds (resolv.conf(5)).
const ANSWER: Duration = Duration::from_secs(5);
/// The longest datagram.
const MAX_MESSAGE: usize = u16::MAX as usize;
/// The code of an answer, in the fourth byte of a message (RFC 1035, 4.1.1).
const CODE_BITS: u8 = 0x0f;
const SERVER_FAILURE: u8 = 2;
const REFUSED: u8 = 5;

/// Why containers get no answers.
#[derive(Debug, thiserror::Error)]
pub enum ResolverError {
    #[error("can't reach the agent")]
    Agent(#[source] io::Error),
    #[error("a program in the guest has the address {DOCKERS}:{PORT}")]
    Taken,
}

/// A container's `resolv.conf` that names docker's resolver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DockersNames {
    /// Servers for all names but those of containers.
    others: Vec<IpAddr>,
}

impl DockersNames {
    /// None where `resolv.conf` names another resolver. Since version 25 docker notes there which servers it would ask; before, and
    /// without that, they are the host's.
    pub fn in_file(resolv_conf: &str, hosts: &str) -> Option<Self> {
        servers(resolv_conf).find(|server| *server == DOCKERS)?;
        let noted = resolv_conf
            .lines()
            .find_map(|line| line.strip_prefix("# ExtServers:"));
        let others = match noted {
            Some(noted) => noted.split_whitespace().filter_map(noted_server).collect(),
            None => servers(hosts).collect(),
        };
        Some(Self { others })
    }

    /// Answers the guest's queries for docker's resolver until its connection ends, with the VM.
    pub async fn serve(self, netns: &Path, dialer: &Dialer) -> Result<(), ResolverError> {
        let at = SocketAddr::from((DOCKERS, PORT));
        let guest = dialer.resolve(at).await.map_err(ResolverError::Agent)?;
        let guest = guest.ok_or(ResolverError::Taken)?;
        let asking = Arc::new(Asking {
            netns: netns.to_owned(),
            others: self.others,
        });
        tokio::spawn(carry(guest, asking));
        Ok(())
    }
}

fn servers(resolv_conf: &str) -> impl Iterator<Item = IpAddr> {
    resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then(|| words.next()?.parse().ok())?
    })
}

/// `8.8.8.8`, or `host(127.0.0.53)` for one that is to be asked from the host's namespace, within a pair of brackets.
fn noted_server(word: &str) -> Option<IpAddr> {
    let word = word.trim_matches(['[', ']']);
    let hosts = word.strip_prefix("host(").and_then(|w| w.strip_suffix(')'));
    hosts.unwrap_or(word).parse().ok()
}

/// Passes the guest's queries on, and their answers back. The guest may send what it likes: it can ask docker's resolver anyway.
async fn carry(guest: UnixStream, asking: Arc<Asking>) {
    let (from_guest, mut to_guest) = guest.into_split();
    let (answers, mut answered) = mpsc::channel::<Vec<u8>>(MAX_QUERIES);
    let answer = async {
        while let Some(answer) = answered.recv().await {
            let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
            to_guest.write_u16(length).await?;
            to_guest.write_all(&answer[..length.into()]).await?;
        }
        io::Result::Ok(())
    };
    let ended = tokio::select! {
        ended = answer => ended,
        ended = take_queries(from_guest, asking, answers) => ended,
    };
    tracing::debug!(?ended, "no more DNS queries");
}

async fn take_queries(
    mut guest: OwnedReadHalf,
    asking: Arc<Asking>,
    answers: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let slots = Arc::new(Semaphore::new(MAX_QUERIES));
    loop {
        let mut query = vec![0; usize::from(guest.read_u16().await?)];
        guest.read_exact(&mut query).await?;
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            continue;
        };
        let (asking, answers) = (asking.clone(), answers.clone());
        tokio::spawn(async move {
            if let Some(answer) = asking.ask(&query).await {
                let _ = answers.send(answer).await;
            }
            drop(slot);
        });
    }
}

/// Who is asked.
#[derive(Debug)]
struct Asking {
    netns: PathBuf,
    others: Vec<IpAddr>,
}

impl Asking {
    async fn ask(&self, query: &[u8]) -> Option<Vec<u8>> {
        let dockers = timeout(KNOWS, self.ask_docker(query)).await;
        let failed = match dockers {
            Ok(Ok(answer)) if is_final(&answer) => return Some(answer),
            Ok(Ok(failed)) => Some(failed),
            _ => None,
        };
        for server in &self.others {
            if let Ok(Ok(answer)) = timeout(ANSWER, ask_from_host(query, *server)).await {
                return Some(answer);
            }
        }
        failed
    }

    async fn ask_docker(&self, query: &[u8]) -> Result<Vec<u8>, NetworkError> {
        let open = in_netns(&self.netns, |_| {
            let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            socket.set_nonblocking(true)?;
            io::Result::Ok(socket)
        });
        let socket = open.await?.and_then(UdpSocket::from_std);
        let socket = socket.map_err(NetworkError::Socket)?;
        let asked = exchange(&socket, query, (DOCKERS, PORT).into()).await;
        asked.map_err(NetworkError::Socket)
    }
}

async fn ask_from_host(query: &[u8], server: IpAddr) -> io::Result<Vec<u8>> {
    let any = match server {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    exchange(&socket, query, (server, PORT).into()).await
}

async fn exchange(socket: &UdpSocket, query: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut answer = vec![0; MAX_MESSAGE];
    let length = socket.recv(&mut answer).await?;
    answer.truncate(length);
    Ok(answer)
}

/// Whether an answer says something of the name, and not of the server's own trouble.
fn is_final(answer: &[u8]) -> bool {
    let code = answer.get(3).map(|byte| byte & CODE_BITS);
    code.is_some_and(|code| code != SERVER_FAILURE && code != REFUSED)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTS: &str = "nameserver 10.0.0.53\nnameserver fd00::53\n";

    fn others(text: &str) -> Option<Vec<String>> {
        let names = DockersNames::in_file(text, HOSTS)?;
        Some(names.others.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn dockers_files_name_their_servers() {
        let old = "search example.test\nnameserver 127.0.0.11\noptions ndots:0\n";
        assert_eq!(others(old).unwrap(), ["10.0.0.53", "fd00::53"]);
        let noted = "nameserver 127.0.0.11\n# ExtServers: [host(127.0.0.53) 9.9.9.9 fd00::1]\n";
        assert_eq!(others(noted).unwrap(), ["127.0.0.53", "9.9.9.9", "fd00::1"]);
        let none = "nameserver 127.0.0.11\n# ExtServers: []\n";
        assert_eq!(others(none).unwrap(), [""; 0]);
        for other in [
            "",
            "nameserver 127.0.0.1\n",
            "#nameserver 127.0.0.11\n",
            HOSTS,
        ] {
            assert_eq!(others(other), None, "{other}");
        }
    }

    #[test]
    fn a_servers_own_trouble_is_no_answer() {
        let coded = |code: u8| is_final(&[0, 1, 0x81, 0x80 | code]);
        assert!(coded(0) && coded(3), "an address, or no such name");
        assert!(!coded(2) && !coded(5) && !is_final(&[]));
    }
}
