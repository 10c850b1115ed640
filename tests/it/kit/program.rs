//! What the manifests and the image say of the program, held against the program: its flags, its
//! settings, its ports and its paths.

use std::{collections::BTreeSet, fs, process::Stdio};

use regex::Regex;
use serde_json::Value;
use tokio::process::Command;

use super::{environment, manifest, pod, rendered, yaml};
use crate::support::{Process, server_command};

/// The settings of the Dockerfile's ENV.
pub fn image_settings() -> Vec<(String, String)> {
    let dockerfile = fs::read_to_string("Dockerfile").unwrap();
    let (_, env) = dockerfile.split_once("\nENV ").unwrap();
    let mut settings = Vec::new();
    for line in env.lines() {
        let more = line.ends_with('\\');
        let (name, value) = line.trim().trim_end_matches(" \\").split_once('=').unwrap();
        settings.push((name.to_owned(), value.to_owned()));
        if !more {
            break;
        }
    }
    settings
}

async fn help(command: &mut Command) -> String {
    let output = command.arg("--help").stdout(Stdio::piped()).output().await.unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// The port of `0.0.0.0:PORT`.
fn port(address: &str) -> u64 {
    address.rsplit_once(':').unwrap().1.parse().unwrap()
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn every_setting_of_the_manifests_is_one_of_the_program() {
    let help = help(&mut server_command(&[])).await;
    let known: BTreeSet<_> = Regex::new(r"\[env: ([A-Z_]+)")
        .unwrap()
        .captures_iter(&help)
        .map(|found| found[1].to_owned())
        .collect();
    let mut named: BTreeSet<_> = image_settings().into_iter().map(|(name, _)| name).collect();
    for overlay in ["k8s/overlays/demo", "k8s/overlays/production"] {
        let manifests = rendered(overlay).await;
        let deployment = manifest(&manifests, "Deployment", "order-service");
        named.extend(environment(pod(deployment)).into_keys());
    }
    assert!(named.len() > 8);
    let unknown: Vec<_> = named.difference(&known).collect();
    assert_eq!(unknown, Vec::<&String>::new(), "{help}");
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_program_runs_with_the_settings_of_the_manifests_and_answers_their_probes() {
    for overlay in ["k8s/overlays/demo", "k8s/overlays/production"] {
        let manifests = rendered(overlay).await;
        let pod = pod(manifest(&manifests, "Deployment", "order-service"));
        let container = &pod["containers"][0];
        // Its ports are those that the container and the Services name.
        let settings = environment(pod);
        let ports = container["ports"].as_array().unwrap();
        let of = |name: &str| {
            let port = ports.iter().find(|port| port["name"] == name).unwrap();
            port["containerPort"].as_u64().unwrap()
        };
        assert_eq!(port(settings["ORDER_LISTEN"].as_ref().unwrap()), of("api"));
        assert_eq!(port(settings["ORDER_ADMIN_LISTEN"].as_ref().unwrap()), of("metrics"));
        for service in ["order-service", "order-service-headless"] {
            let port = &manifest(&manifests, "Service", service)["spec"]["ports"][0];
            assert_eq!((&port["port"], &port["targetPort"]), (&8181.into(), &"api".into()));
        }

        let server = Process::start_command("sqlite::memory:", &[], |command| {
            for (name, value) in settings {
                // Addresses and the database are this test's own.
                if let Some(value) = value.filter(|_| !name.ends_with("_LISTEN")) {
                    command.env(name, value);
                }
            }
        })
        .await;
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let get = &container[probe]["httpGet"];
            assert_eq!(get["port"], "metrics");
            let path = get["path"].as_str().unwrap();
            let answer = reqwest::get(format!("http://{}{path}", server.admin)).await.unwrap();
            assert_eq!(answer.status(), 200, "{probe} {path}");
        }
        let limit = container["env"].as_array().unwrap();
        let limit = limit.iter().find(|v| v["name"] == "ORDER_MAX_IN_FLIGHT").unwrap();
        let live = server.scrape().await.value("requests_in_flight_limit", &[]);
        assert_eq!(limit["value"].as_str().unwrap().parse::<f64>().unwrap(), live);
    }
    let endpoint =
        &yaml("k8s/components/podmonitor/podmonitor.yaml")["spec"]["podMetricsEndpoints"][0];
    assert_eq!((&endpoint["port"], &endpoint["path"]), (&"metrics".into(), &"/metrics".into()));
}

#[tokio::test]
async fn the_image_has_the_defaults_of_the_program() {
    let settings = image_settings();
    let server = Process::start_command("sqlite::memory:", &[], |command| {
        for (name, value) in &settings {
            if !name.ends_with("_LISTEN") {
                command.env(name, value);
            }
        }
    })
    .await;
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 0.0);
    let of = |name: &str| &settings.iter().find(|setting| setting.0 == name).unwrap().1;
    assert_eq!((port(of("ORDER_LISTEN")), port(of("ORDER_ADMIN_LISTEN"))), (8181, 9464));
    let dockerfile = fs::read_to_string("Dockerfile").unwrap();
    assert!(dockerfile.contains("\nEXPOSE 8181 9464\n"));
    let version = format!("ORDER_SERVICE_VERSION={}\n", env!("CARGO_PKG_VERSION"));
    assert!(dockerfile.contains(&version), "{version}");
    // The toolchain is no older than the one Cargo.toml asks for.
    let rust = Regex::new(r"FROM docker.io/library/rust:1\.(\d+)\.\d+-slim-bookworm AS build");
    let rust: u32 = rust.unwrap().captures(&dockerfile).unwrap()[1].parse().unwrap();
    let needed = env!("CARGO_PKG_RUST_VERSION").split('.').nth(1).unwrap().parse::<u32>().unwrap();
    assert!(rust >= needed, "{rust}, {needed}");
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_load_job_calls_the_load_test_as_it_wants_to_be_called() {
    let manifests = rendered("k8s/load").await;
    let container = &pod(manifest(&manifests, "Job", "order-load"))["containers"][0];
    assert_eq!(container["command"], serde_json::json!(["/usr/local/bin/order-load"]));
    let args = container["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap());
    let args: Vec<_> = args.collect();
    let help = help(&mut Command::new(env!("CARGO_BIN_EXE_order-load"))).await;
    for arg in &args {
        let flag = arg.split('=').next().unwrap();
        assert!(
            Regex::new(&format!(r"(?m)^ +{flag}(?-u:\b)")).unwrap().is_match(&help),
            "{flag}: {help}"
        );
    }

    // With a target and phases of this test's own it places orders and ends well.
    let server = Process::start("sqlite::memory:", &[]).await;
    let own = [format!("--target={}", server.url("")), "--phases=1s@20".to_owned()];
    let others =
        args.iter().filter(|arg| !arg.starts_with("--target") && !arg.starts_with("--phases"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_order-load"));
    let output = command.args(own).args(others).output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(server.scrape().await.value("product_order_total", &[]) >= 1.0);
    let target = args.iter().find_map(|arg| arg.strip_prefix("--target=")).unwrap();
    assert_eq!(target, "http://order-service-headless.orders.svc:8181");
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_demo_reaches_its_database() {
    let manifests = rendered("k8s/overlays/demo").await;
    let service = manifest(&manifests, "Service", "postgres");
    let secret = &manifest(&manifests, "Secret", "order-service-database")["stringData"];
    let database = pod(manifest(&manifests, "StatefulSet", "postgres"));
    let settings = environment(database);
    let url = secret["url"].as_str().unwrap();
    let expected = format!(
        "postgres://{}:{}@{}.{}.svc:{}/{}",
        settings["POSTGRES_USER"].as_ref().unwrap(),
        secret["password"].as_str().unwrap(),
        service["metadata"]["name"].as_str().unwrap(),
        service["metadata"]["namespace"].as_str().unwrap(),
        service["spec"]["ports"][0]["port"],
        settings["POSTGRES_DB"].as_ref().unwrap(),
    );
    assert_eq!(url, expected);
    // What the Deployment asks the Secret for is there.
    let service = pod(manifest(&manifests, "Deployment", "order-service"));
    let variables = service["containers"][0]["env"].as_array().unwrap();
    let from: Vec<&Value> = variables.iter().filter(|v| !v["valueFrom"].is_null()).collect();
    assert_eq!(from.len(), 1);
    let reference = &from[0]["valueFrom"]["secretKeyRef"];
    assert_eq!(
        (&reference["name"], &reference["key"]),
        (&"order-service-database".into(), &"url".into())
    );
}
