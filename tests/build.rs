//! Parses the proto of Kubernetes' Container Runtime Interface (from cri-api, Apache-2.0) for the tests' CRI client.

use protobuf::Message;

fn main() {
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo:rerun-if-changed=proto/cri.proto");
    let files = protobuf_parse::Parser::new()
        .pure()
        .include("proto")
        .input("proto/cri.proto")
        .file_descriptor_set()
        .expect("cri.proto parses");
    let bytes = files.write_to_bytes().expect("descriptors encode");
    std::fs::write(out.join("cri.bin"), bytes).expect("OUT_DIR is writable");
}
