//! The Job that migrates in `production`, held against the program, the database's roles and the
//! rest of the kit.

use std::{collections::BTreeSet, fs};

use serde_json::Value;
use sqlx::{AssertSqlSafe, Executor as _};

use super::{environment, manifest, pod, rendered};
use crate::{
    postgres::{PASSWORD, PostgresServer},
    prune::documented,
    support::{Process, server_command},
};

const PRODUCTION: &str = "k8s/overlays/production";

/// The Secret that the one container gets its database URL from.
fn secret(workload: &Value) -> String {
    let variables = pod(workload)["containers"][0]["env"].as_array().unwrap();
    let url = variables.iter().find(|variable| variable["name"] == "DATABASE_URL").unwrap();
    let reference = &url["valueFrom"]["secretKeyRef"];
    assert_eq!(reference["key"], "url");
    reference["name"].as_str().unwrap().to_owned()
}

#[tokio::test]
#[ignore = "needs kustomize and PostgreSQL's server programs; run by make test"]
async fn the_job_migrates_and_the_deployment_serves_each_with_its_role() {
    let manifests = rendered(PRODUCTION).await;
    let job = manifest(&manifests, "Job", "order-service-migrate");
    let deployment = manifest(&manifests, "Deployment", "order-service");
    let server = PostgresServer::start().await;
    let roles = documented(&["CREATE ROLE orders LOGIN"]);
    server.connect().await.execute(AssertSqlSafe(roles)).await.unwrap();
    let url = |role: &str| server.url().replace(&format!("postgres:{PASSWORD}"), role);
    let (owner, serving) = (url("orders_owner:OWNER-PASSWORD"), url("orders:SERVICE-PASSWORD"));
    let settings = |workload| {
        let settings = environment(pod(workload)).into_iter();
        settings.filter_map(|(name, value)| Some((name, value?))).collect::<Vec<_>>()
    };
    let spawn = |serving: &str| {
        Process::spawn(serving, &[], |command| {
            // Addresses are this test's own.
            let settings = settings(deployment).into_iter();
            command.envs(settings.filter(|(name, _)| !name.ends_with("_LISTEN")));
        })
    };
    // A pod of the Deployment that is first ends, and is started again.
    assert_eq!(spawn(&serving).ended().await, Some(1));

    let container = &pod(job)["containers"][0];
    assert_eq!(container["command"], Value::Null, "the image's entry point");
    let args: Vec<_> =
        container["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
    let mut command = server_command(&args);
    command.envs(settings(job)).env("DATABASE_URL", &owner);
    let output = command.output().await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");

    let mut service = spawn(&serving);
    service.serving().await;
    let placed = reqwest::get(service.url("/product")).await.unwrap();
    assert_eq!(placed.status(), 200);
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn only_the_job_gets_the_login_of_the_owner() {
    let manifests = rendered(PRODUCTION).await;
    let job = manifest(&manifests, "Job", "order-service-migrate");
    let deployment = manifest(&manifests, "Deployment", "order-service");
    assert_ne!(secret(job), secret(deployment));
    assert_eq!(environment(pod(deployment))["ORDER_MIGRATIONS"].as_deref(), Some("check"));
    // The demo has one role, whose replicas apply.
    let demo = rendered("k8s/overlays/demo").await;
    let demo = environment(pod(manifest(&demo, "Deployment", "order-service")));
    assert!(!demo.contains_key("ORDER_MIGRATIONS"));

    let readme = fs::read_to_string("README.md").unwrap();
    let production = readme.split("\n### Production\n").nth(1).unwrap();
    let made: BTreeSet<_> = production
        .lines()
        .filter_map(|line| line.split(" create secret generic ").nth(1))
        .map(|rest| rest.split(' ').next().unwrap().to_owned())
        .collect();
    assert_eq!(made, BTreeSet::from([secret(job), secret(deployment)]));
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_job_reaches_the_database_and_nothing_takes_it_for_the_service() {
    let manifests = rendered(PRODUCTION).await;
    let job = manifest(&manifests, "Job", "order-service-migrate");
    let labels = &job["spec"]["template"]["metadata"]["labels"];
    let policy = manifest(&manifests, "NetworkPolicy", "order-service-migrate");
    assert_eq!(&policy["spec"]["podSelector"]["matchLabels"], labels);
    let of_service = manifest(&manifests, "NetworkPolicy", "order-service");
    assert_eq!(policy["spec"]["egress"], of_service["spec"]["egress"]);
    assert_eq!(policy["spec"]["ingress"], Value::Null);
    for manifest in &manifests {
        let spec = &manifest["spec"];
        for selector in [&spec["selector"], &spec["selector"]["matchLabels"]] {
            assert_ne!(selector, labels, "{manifest}");
        }
    }
    // It stays out of the way of the next version.
    assert!(job["spec"]["ttlSecondsAfterFinished"].as_u64().unwrap() <= 600);
    assert_eq!(job["spec"]["activeDeadlineSeconds"], Value::Null, "a migration is never cut off");
}
