//! A client of the CRI: unary gRPC calls over a unix socket, with requests and answers as JSON.
//!
//! gRPC is one HTTP/2 stream per call: `POST /package.Service/Method`, the body a message behind a byte that says
//! "not compressed" and its length in 4 bytes; the answer's trailers carry `grpc-status` and `grpc-message`. Messages are made by
//! reflection from `cri.proto`, so a request is the JSON form of protobuf, and a field that the CRI does not have is an error.

use anyhow::{Context, Result, anyhow, ensure};
use h2::RecvStream;
use http::HeaderMap;
use protobuf::Message;
use protobuf::descriptor::FileDescriptorSet;
use protobuf::reflect::{FileDescriptor, MessageDescriptor, MethodDescriptor};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

static CRI: LazyLock<Schema> =
    LazyLock::new(|| Schema::new(include_bytes!(concat!(env!("OUT_DIR"), "/cri.bin"))));

/// A proto file with services.
#[derive(Debug)]
pub(super) struct Schema(FileDescriptor);

impl Schema {
    /// From what the build made of the file.
    pub(super) fn new(bytes: &[u8]) -> Self {
        let set = FileDescriptorSet::parse_from_bytes(bytes).expect("the build wrote it");
        let files = FileDescriptor::new_dynamic_fds(set.file, &[]);
        Self(
            files
                .expect("the build checked it")
                .pop()
                .expect("there is one file"),
        )
    }

    /// A method of any of its services, and that service's name.
    pub(super) fn find(&self, method: &str) -> Result<(String, MethodDescriptor)> {
        for service in self.0.services() {
            if let Some(found) = service.methods().find(|m| m.proto().name() == method) {
                return Ok((service.proto().name().to_owned(), found));
            }
        }
        Err(anyhow!("{} has no method {method}", self.0.package()))
    }
}

/// A message from its JSON form.
pub(super) fn encode(kind: &MessageDescriptor, message: &Value) -> Result<Vec<u8>> {
    let mut encoded = kind.new_instance();
    protobuf_json_mapping::merge_from_str(&mut *encoded, &message.to_string())
        .with_context(|| format!("{message} is no {}", kind.name()))?;
    Ok(encoded.write_to_bytes_dyn()?)
}

/// A message's JSON form.
pub(super) fn decode(kind: &MessageDescriptor, bytes: &[u8]) -> Result<Value> {
    let message = kind.parse_from_bytes(bytes)?;
    let options = protobuf_json_mapping::PrintOptions {
        proto_field_name: true,
        always_output_default_values: true,
        ..Default::default()
    };
    let json = protobuf_json_mapping::print_to_string_with_options(&*message, &options)?;
    Ok(serde_json::from_str(&json)?)
}

/// A message as it is in a stream: not compressed, its length.
pub(super) fn frame(message: &[u8]) -> Result<Vec<u8>> {
    let length = u32::try_from(message.len())?.to_be_bytes();
    Ok([&[0], &length[..], message].concat())
}

/// The one message of a stream.
pub(super) fn unframe(mut stream: Vec<u8>) -> Result<Vec<u8>> {
    ensure!(stream.len() >= 5 && stream[0] == 0, "no gRPC message");
    Ok(stream.split_off(5))
}

/// Reads a stream to its end.
pub(super) async fn read(body: &mut RecvStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// The server refused a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{method}: {message} (gRPC code {code})")]
pub struct Refused {
    pub method: String,
    /// The gRPC status code: 2 unknown, 5 not found, …
    pub code: u32,
    pub message: String,
}

/// Where a CRI server listens. Every call has a connection of its own, so a server may restart between two.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Calls a method of the runtime or image service. Errors of the server are a [`Refused`].
    pub fn call(&self, method: &str, request: &Value) -> Result<Value> {
        let (service, descriptor) = CRI.find(method)?;
        let bytes = encode(&descriptor.input_type(), request)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let path = format!("/{}.{service}/{method}", CRI.0.package());
        let answer = runtime.block_on(async {
            let call = unary(&self.socket, &path, &bytes);
            tokio::time::timeout(crate::PATIENCE, call)
                .await
                .with_context(|| format!("{method} takes longer than {:?}", crate::PATIENCE))?
        })?;
        let answer = answer.map_err(|(code, message)| Refused {
            method: method.to_owned(),
            code,
            message,
        })?;
        decode(&descriptor.output_type(), &answer)
    }
}

/// The answer's message, or the server's status code and message.
async fn unary(
    socket: &Path,
    path: &str,
    message: &[u8],
) -> Result<Result<Vec<u8>, (u32, String)>> {
    let stream = tokio::net::UnixStream::connect(socket)
        .await
        .with_context(|| format!("can't connect to {}", socket.display()))?;
    let (sender, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    let request = http::Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (answer, mut body) = sender.ready().await?.send_request(request, false)?;
    body.send_data(frame(message)?.into(), true)?;

    let (head, mut body) = answer.await?.into_parts();
    ensure!(head.status == 200, "HTTP status {}", head.status);
    if let Some(refused) = refusal(&head.headers) {
        return Ok(Err(refused));
    }
    let stream = read(&mut body).await?;
    let trailers = body.trailers().await?.context("no trailers")?;
    if let Some(refused) = refusal(&trailers) {
        return Ok(Err(refused));
    }
    unframe(stream).map(Ok)
}

fn refusal(headers: &HeaderMap) -> Option<(u32, String)> {
    let text = |name| headers.get(name)?.to_str().ok();
    let code = text("grpc-status")?.parse().unwrap_or(u32::MAX);
    (code != 0).then(|| (code, percent_decoded(text("grpc-message").unwrap_or(""))))
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let byte = tail.get(..2).filter(|_| *first == b'%');
        let byte = byte.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The bytes of a protobuf `bytes` field in JSON: base64 with padding.
pub fn bytes(value: &Value) -> Vec<u8> {
    let text = value.as_str().unwrap_or("").trim_end_matches('=');
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    for group in text.as_bytes().chunks(4) {
        let bits = group
            .iter()
            .fold(0u32, |bits, c| bits << 6 | u32::from(digit(*c)));
        let bits = bits << (6 * (4 - group.len()));
        out.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    out
}

/// A number, which JSON writes as a string where it has 64 bits. Wrapped ones (`UInt64Value`) are unwrapped.
pub fn number(value: &Value) -> u64 {
    match value {
        Value::Object(wrapper) => wrapper.get("value").map_or(0, number),
        Value::String(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{text:?} is a number")),
        other => other
            .as_u64()
            .unwrap_or_else(|| panic!("{other} is a number")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_proto_has_both_services_and_refuses_unknown_fields() {
        assert_eq!(CRI.find("RunPodSandbox").unwrap().0, "RuntimeService");
        assert_eq!(CRI.find("ListImages").unwrap().0, "ImageService");
        let client = Client::new(Path::new("/nowhere"));
        let error = client
            .call("StopPodSandbox", &json!({"pod": "x"}))
            .unwrap_err();
        assert!(format!("{error:#}").contains("pod"), "{error:#}");
    }

    #[test]
    fn text_of_grpc_and_bytes_of_json_are_decoded() {
        assert_eq!(percent_decoded("a%0Ab %zz 100%"), "a\nb %zz 100%");
        for (text, want) in [
            ("", ""),
            ("YQ==", "a"),
            ("YWI=", "ab"),
            ("YWJjZA==", "abcd"),
        ] {
            assert_eq!(bytes(&json!(text)), want.as_bytes());
        }
    }
}
