//! A small kubelet: containerd with the CRI plugin, a bridge CNI and images, and pods on it by the CRI alone.

pub mod grpc;
pub mod node;
pub mod pod;
pub mod snapshotter;
pub mod stream;

pub use node::{Config, Handler, Node};
pub use pod::{Container, Pod};
