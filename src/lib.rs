//! A durable order service over gRPC and REST that scales on its own business metric.
//!
//! The modules in the order in which a request meets them:
//!
//! - [`usage`], [`config`], [`logs`], [`app`]: from the arguments to the running parts, and their
//!   end;
//! - [`listener`]: connections, their limits, their age, TLS; [`workers`]: the threads they are on;
//! - [`metrics`]: every family; [`metrics::layer`] records each request, by what [`wire`] reads in
//!   its headers;
//! - [`api`]: the router of both protocols under the one stack of [`layers`];
//! - [`grpc`], [`rest`]: protocol to domain and back, [`proto`] being what they speak, and
//!   [`error`] the one table of failures;
//! - [`health`]: gRPC's health service, beside them;
//! - [`orders`]: the use cases, over the types and rules of [`mod@order`];
//! - [`store`]: the queue, the group commit, the engines;
//! - [`admin`]: `/metrics`, `/livez`, `/readyz` on a listener of their own.

pub mod admin;
pub mod api;
pub mod app;
pub mod config;
pub mod error;
pub mod grpc;
pub mod health;
pub mod layers;
pub mod listener;
pub mod logs;
pub mod metrics;
pub mod order;
pub mod orders;
pub mod panics;
pub mod proto;
pub mod rest;
pub mod store;
pub mod usage;
pub mod wire;
pub mod workers;
