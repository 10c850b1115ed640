//! The service as its users see it: real processes, real sockets, real database files. One module
//! for each behaviour.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod admin;
mod age;
mod connections;
mod dashboard;
mod dashboard_rules;
mod dashboard_values;
mod database;
mod database_start;
mod discovery;
mod disk_full;
mod documents;
mod drain;
mod durability;
mod errors;
mod example;
mod hostile;
mod in_process;
mod kit;
mod load;
mod load_audit;
mod load_faults;
mod logs;
mod metrics;
mod outages;
mod overload;
mod peers;
mod place;
mod postgres;
mod prometheus;
mod prometheus_server;
mod proxy;
mod prune;
mod readme;
mod replicas;
mod shared_database;
mod stack;
mod store;
mod strange_input;
mod support;
mod tls;
mod traffic;
mod unknown_outcomes;
mod usage;
