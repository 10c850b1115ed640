//! A durable order service over gRPC and REST that scales on its own business metric.

pub mod config;
pub mod metrics;
pub mod order;
pub mod store;
