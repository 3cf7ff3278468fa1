//! Parses the protos that the tests speak: Kubernetes' Container Runtime Interface (from cri-api, Apache-2.0), and containerd's snapshots.

use protobuf::Message;

fn main() {
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for name in ["cri", "snapshots"] {
        let file = format!("proto/{name}.proto");
        println!("cargo:rerun-if-changed={file}");
        let files = protobuf_parse::Parser::new()
            .pure()
            .include("proto")
            .input(&file)
            .file_descriptor_set()
            .unwrap_or_else(|error| panic!("{file} does not parse: {error}"));
        let bytes = files.write_to_bytes().expect("descriptors encode");
        std::fs::write(out.join(format!("{name}.bin")), bytes).expect("OUT_DIR is writable");
    }
}
