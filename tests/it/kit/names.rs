//! Every metric and label that the kit's queries name is on the live page.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use regex::Regex;
use serde_json::Value;

use super::{files, triggers, yaml};
use crate::support::Process;

/// What other exporters serve, with the labels that are used here: kube-state-metrics, KEDA, and Prometheus itself.
const FOREIGN: &[(&str, &[&str])] = &[
    ("up", &[]),
    ("ALERTS", &["alertname", "alertstate", "severity"]),
    ("kube_horizontalpodautoscaler_spec_max_replicas", &["horizontalpodautoscaler"]),
    ("kube_horizontalpodautoscaler_spec_min_replicas", &["horizontalpodautoscaler"]),
    ("kube_horizontalpodautoscaler_status_current_replicas", &["horizontalpodautoscaler"]),
    ("kube_horizontalpodautoscaler_status_desired_replicas", &["horizontalpodautoscaler"]),
    ("kube_deployment_status_replicas_ready", &["deployment"]),
    ("kube_deployment_spec_replicas", &["deployment"]),
    ("kube_pod_status_ready", &["condition"]),
    ("kube_pod_container_status_restarts_total", &["container"]),
    ("keda_scaler_metrics_value", &["exported_namespace", "scaledObject", "scaler", "metric"]),
    ("keda_scaled_object_errors_total", &["scaledObject"]),
];

/// What the scrape adds to every series.
const OF_THE_TARGET: &[&str] = &["job", "instance", "namespace", "pod"];

/// What follows no metric but may stand alone in a query.
const WORDS: &[&str] = &["and", "or", "unless", "bool", "offset", "inf", "nan", "by", "on"];

/// A query's metrics with the labels that are selected on, and the labels that it groups or joins by.
#[derive(Debug, PartialEq)]
struct Names {
    metrics: Vec<(String, Vec<String>)>,
    groupings: Vec<String>,
}

fn names(query: &str) -> Names {
    let regex = |pattern: &str| Regex::new(pattern).unwrap();
    let query = regex(r#""(\\.|[^"\\])*"|'[^']*'"#).replace_all(query, "''");
    // A dashboard's variables.
    let query = regex(r"\$(\w+|\{\w+\})").replace_all(&query, "1");
    let mut groupings = Vec::new();
    let grouping = regex(r"(?-u:\b)(by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)");
    for found in grouping.captures_iter(&query) {
        let labels = found[2].split(',').map(str::trim).filter(|label| !label.is_empty());
        groupings.extend(labels.map(str::to_owned));
    }
    let query = grouping.replace_all(&query, " ");
    let query = regex(r"\[[^\]]*\]|(?-u:\b)offset\s+\S+").replace_all(&query, " ");
    let label = regex(r"(\w+)\s*(=~|!~|!=|=)");
    let metrics = regex(r"(?-u:\b)([a-zA-Z_:][\w:]*)\s*(\{[^}]*\}|\()?")
        .captures_iter(&query)
        .filter(|found| found.get(2).is_none_or(|next| next.as_str() != "("))
        .filter(|found| !WORDS.contains(&found[1].to_lowercase().as_str()))
        .map(|found| {
            let braces = found.get(2).map_or("", |braces| braces.as_str());
            let labels = label.captures_iter(braces).map(|label| label[1].to_owned());
            (found[1].to_owned(), labels.collect())
        })
        .collect();
    Names { metrics, groupings }
}

#[test]
fn names_are_read_out_of_queries() {
    let query = r#"sum by (namespace, le) (rate(a_total{job="x",code=~"5.."}[5m] offset 1m)) / on (pod) group_left b_x > 0.5"#;
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let metrics =
        vec![("a_total".to_owned(), owned(&["job", "code"])), ("b_x".to_owned(), Vec::new())];
    let query = names(&query.replace("group_left b_x", "b_x"));
    assert_eq!(query, Names { metrics, groupings: owned(&["namespace", "le", "pod"]) });
}

/// The series of a page by name, each with its labels.
fn series(page: &str) -> BTreeMap<String, BTreeSet<String>> {
    let label = Regex::new("([a-z_]+)=\"").unwrap();
    let mut series: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let (name, _) = line.split_once(['{', ' ']).unwrap();
        let labels = label.captures_iter(line).map(|found| found[1].to_owned());
        series.entry(name.to_owned()).or_default().extend(labels);
    }
    series
}

/// Every string under one of these keys, anywhere in a document.
fn under<'v>(value: &'v Value, keys: &[&str], found: &mut Vec<&'v str>) {
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                match member.as_str() {
                    Some(text) if keys.contains(&key.as_str()) => found.push(text),
                    _ => under(member, keys, found),
                }
            }
        }
        Value::Array(elements) => elements.iter().for_each(|element| under(element, keys, found)),
        _ => {}
    }
}

/// Every query of the kit, with where it stands.
async fn queries() -> Vec<(String, String)> {
    let mut queries = Vec::new();
    for overlay in ["k8s/overlays/demo", "k8s/overlays/production"] {
        for (name, query, _) in triggers(overlay).await {
            queries.push((format!("{overlay} {name}"), query));
        }
    }
    let dashboards = if fs::exists("grafana").unwrap() { files("grafana") } else { Vec::new() };
    let documents = files("prometheus/rules")
        .into_iter()
        .chain(dashboards.into_iter().filter(|file| file.ends_with(".json")));
    for file in documents {
        let document = yaml(&file);
        let mut found = Vec::new();
        under(&document, &["expr", "definition"], &mut found);
        queries.extend(found.into_iter().map(|query| (file.clone(), query.to_owned())));
    }
    // The runbook's are indented, as its commands are.
    let runbook = fs::read_to_string("docs/runbook.md").unwrap();
    let indented = runbook.lines().filter_map(|line| line.strip_prefix("    "));
    let asked = indented.filter(|line| !line.starts_with("kubectl "));
    queries.extend(asked.map(|query| ("docs/runbook.md".to_owned(), query.to_owned())));
    queries
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn every_metric_and_label_of_the_kit_exists() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut known = series(&server.scrape().await.0);
    for (name, labels) in FOREIGN {
        known.insert((*name).to_owned(), labels.iter().map(|label| (*label).to_owned()).collect());
    }
    for rules in files("prometheus/rules") {
        let rules = yaml(&rules);
        let mut records = Vec::new();
        under(&rules, &["record"], &mut records);
        known.extend(records.into_iter().map(|record| (record.to_owned(), BTreeSet::new())));
    }
    let queries = queries().await;
    assert!(queries.len() > 30, "{}", queries.len());
    // A dashboard's variable: `label_values(metric{…}, label)`.
    let inner = Regex::new(r"^label_values\((.*?),\s*(\w+)\)$").unwrap();
    // `label_replace(…, "made", "$1", "source", "regex")`
    let made = Regex::new(r#""(\w+)",\s*"[^"]*",\s*"\w+",\s*""#).unwrap();
    for (place, query) in queries {
        let (query, asked) = match inner.captures(&query) {
            Some(found) => (found[1].to_owned(), Some(found[2].to_owned())),
            None => (query, None),
        };
        let Names { metrics, mut groupings } = names(&query);
        groupings.extend(asked);
        assert!(!metrics.is_empty(), "{place}: {query}");
        let mut labels: BTreeSet<_> =
            OF_THE_TARGET.iter().map(|label| (*label).to_owned()).collect();
        labels.extend(made.captures_iter(&query).map(|found| found[1].to_owned()));
        for (metric, selected) in metrics {
            let own = known.get(&metric).unwrap_or_else(|| panic!("{place}: no metric {metric}"));
            for label in selected {
                let there = own.contains(&label) || OF_THE_TARGET.contains(&label.as_str());
                assert!(there, "{place}: {metric} has no label {label}");
            }
            labels.extend(own.iter().cloned());
        }
        for label in groupings {
            assert!(labels.contains(&label), "{place}: no label {label} in {query}");
        }
    }
}
