//! The kit for Kubernetes, KEDA and Prometheus, held against the tools that read it and against the
//! program that it runs.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::Value;
use tokio::process::Command;

mod discovery;
mod manifests;
mod migrate;
mod names;
mod program;
mod queries;
mod rules;

/// The documents of a YAML text.
fn documents(yaml: &str) -> Vec<Value> {
    let documents = serde_yaml_ng::Deserializer::from_str(yaml);
    documents.map(|document| serde::Deserialize::deserialize(document).unwrap()).collect()
}

/// The one document of a YAML file.
fn yaml(path: &str) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    documents(&text).pop().unwrap()
}

/// What a tool says, stdout and stderr together, and whether it was content.
async fn tool(name: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new(name).args(args).output().await;
    let output = output.unwrap_or_else(|error| panic!("{name}: {error}; see make tools"));
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// What the tool says, which must be content.
async fn content(name: &str, args: &[&str]) -> String {
    let (success, text) = tool(name, args).await;
    assert!(success, "{name} {args:?}: {text}");
    text
}

/// Everything that `kubectl apply -k` can be given.
const APPLIED: [&str; 3] = ["k8s/overlays/demo", "k8s/overlays/production", "k8s/load"];

/// The manifests that kustomize makes of a directory.
async fn rendered(directory: &str) -> Vec<Value> {
    documents(&content("kustomize", &["build", directory]).await)
}

/// The one manifest of this kind and name.
fn manifest<'m>(manifests: &'m [Value], kind: &str, name: &str) -> &'m Value {
    let mut found = manifests
        .iter()
        .filter(|manifest| manifest["kind"] == kind && manifest["metadata"]["name"] == name);
    let one = found.next().unwrap_or_else(|| panic!("no {kind} {name}"));
    assert_eq!(found.next(), None, "one {kind} {name}");
    one
}

/// The pod of a Deployment, StatefulSet or Job.
fn pod(workload: &Value) -> &Value {
    &workload["spec"]["template"]["spec"]
}

/// The values in the environment of a pod's one container; of a Secret's, nothing.
fn environment(pod: &Value) -> BTreeMap<String, Option<String>> {
    let variables = pod["containers"][0]["env"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    variables.map(|v| (text(&v["name"]).unwrap(), text(&v["value"]))).collect()
}

/// The triggers of the overlay's ScaledObject: name, query and threshold.
async fn triggers(overlay: &str) -> Vec<(String, String, f64)> {
    let manifests = rendered(overlay).await;
    let scaled = manifest(&manifests, "ScaledObject", "order-service");
    let triggers = scaled["spec"]["triggers"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    triggers
        .map(|trigger| {
            let metadata = &trigger["metadata"];
            let threshold = text(&metadata["threshold"]).parse().unwrap();
            (text(&trigger["name"]), text(&metadata["query"]), threshold)
        })
        .collect()
}

/// Every file below a directory.
fn files(directory: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![Path::new(directory).to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                found.push(path.to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}
