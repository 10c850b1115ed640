//! The code generated from `proto/`, and the descriptor set it was generated from.
#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]

tonic::include_proto!("orders.v1");

/// `orders.v1` and what it imports, as an encoded `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("orders");
