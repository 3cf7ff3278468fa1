//! Network cards that have no interface, out of sight.
//!
//! A VM boots with more cards than the pod has interfaces, for those that come later. Containers would see them as
//! interfaces that are down, so a card without an interface is taken from its driver, and given back when it is needed:
//!
//! ```text
//! /sys/class/net/eth1/device -> ../../../virtio5
//! virtio5 ──► /sys/bus/virtio/drivers/virtio_net/unbind, bind
//! ```

use super::wanted::{Interface, Mac, parse_mac};
use super::{NetworkError, configure, find_card, open};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::task::spawn_blocking;

const INTERFACES: &str = "/sys/class/net";
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";

/// The cards that are put away: the address with which each booted, and its virtio device.
#[derive(Debug, Clone, Default)]
pub struct Cards(Arc<Mutex<HashMap<Mac, String>>>);

impl Cards {
    /// Puts away all cards but those of the named interfaces.
    pub async fn put_away_all_but(&self, names: &[&str]) -> Result<(), NetworkError> {
        for entry in fs::read_dir(INTERFACES).map_err(NetworkError::Cards)? {
            let entry = entry.map_err(NetworkError::Cards)?.path();
            let name = entry.file_name().unwrap_or_default();
            // Interfaces without a device are the kernel's own.
            if names.iter().any(|used| name == *used) || !entry.join("device").exists() {
                continue;
            }
            let address = fs::read_to_string(entry.join("address")).map_err(NetworkError::Cards)?;
            self.put_away(parse_mac(address.trim_end())?, &entry)
                .await?;
        }
        Ok(())
    }

    /// Sets an interface up on its card.
    pub async fn configure(&self, interface: &Interface) -> Result<(), NetworkError> {
        let device = self.lock().remove(&interface.found_by);
        if let Some(device) = device {
            drive("bind", device).await.map_err(NetworkError::Cards)?;
        }
        configure(interface).await
    }

    /// Puts away the card that booted with this address.
    pub async fn remove(&self, card: Mac) -> Result<(), NetworkError> {
        let (_, name) = find_card(&open()?, [card; 2]).await?;
        self.put_away(card, &Path::new(INTERFACES).join(name)).await
    }

    async fn put_away(&self, card: Mac, interface: &Path) -> Result<(), NetworkError> {
        let device = fs::read_link(interface.join("device")).map_err(NetworkError::Cards)?;
        let device = device.file_name().unwrap_or_default().to_string_lossy();
        let unbound = drive("unbind", device.clone().into_owned()).await;
        unbound.map_err(NetworkError::Cards)?;
        self.lock().insert(card, device.into_owned());
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Mac, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes a device's name to the driver's file `verb`. The kernel answers when it is done.
async fn drive(verb: &'static str, device: String) -> io::Result<()> {
    let written = spawn_blocking(move || fs::write(Path::new(DRIVER).join(verb), device)).await;
    written.map_err(io::Error::other)?
}
