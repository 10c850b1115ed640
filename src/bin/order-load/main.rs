//! The load test: places orders on a schedule that no server can slow down, reports what came of
//! them, and on request audits that none was lost, doubled or altered.
//!
//! - [`args`]: the flags; [`schedule`]: from phases to the moment of each order;
//! - [`target`], [`tls`], [`connection`], [`pool`], [`ring`], [`keeper`], [`spread`]: connections,
//!   spread over every address of the target's name;
//! - [`call`], [`grpc`], [`rest`]: one call in either protocol;
//! - [`sender`]: sends each order at its moment, and again if it may have been lost;
//! - [`recorder`], [`progress`], [`report`]: what came of it, meanwhile and at the end;
//! - [`audit`]: reads the orders back.
//!
//! Of the library it uses the proto, the rules of an order and how bad usage is told, nothing of
//! the server.
#![allow(missing_docs, reason = "a program, not a library")]

mod args;
mod audit;
mod call;
mod connection;
mod grpc;
mod keeper;
mod load;
mod pacer;
mod pool;
mod progress;
mod recorder;
mod report;
mod rest;
mod ring;
mod schedule;
mod sender;
mod spread;
mod target;
mod tls;

use std::{
    env,
    io::{Write as _, stderr},
    process::ExitCode,
};

use args::Args;
use mimalloc::MiMalloc;
use order_service::usage::NoArguments;
use target::Target;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    let read = Args::read(env::args_os()).and_then(|args| {
        let target = Target::new(&args).map_err(NoArguments::BadUsage)?;
        Ok((args, target))
    });
    let (args, target) = match read {
        Ok(read) => read,
        Err(refused) => return refused.tell("order-load"),
    };
    // Thousands of connections are within what one may ask for.
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        let _ = writeln!(stderr(), "order-load: the limit of open files stays as it is: {error}");
    }
    // One thread: the calls share the pool and the recorder without waiting for each other.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let passed = match runtime {
        Ok(runtime) => runtime.block_on(load::run(&args, target)),
        Err(error) => Err(error.into()),
    };
    match passed {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(stderr(), "order-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}
