//! Generates the agent's messages and ttrpc service from `proto/agent.proto`, and those of `proto/cri.proto`, without protoc.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo:rerun-if-changed=proto");
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto", "proto/cri.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .expect("the protocols compile");
    std::fs::write(
        out.join("mod.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\npub mod cri;\n",
    )
    .expect("OUT_DIR is writable");
}
