//! Compiles the proto of the peer without a store; the messages are the service's own.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=../proto");
    let descriptors = protox::compile(["limit/v1/limit.proto"], ["proto", "../proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("limit.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_client(false)
        .extern_path(".orders.v1", "::order_service::proto")
        .compile_fds(descriptors)?;
    Ok(())
}
