//! Prometheus' configuration, rules and alerts, by its own tool; the chart's copy of them; and the
//! runbook.

use std::{collections::BTreeSet, env, fs};

use serde_json::{Value, json};

use super::{content, files, tool, triggers, yaml};

fn squeezed(text: &str) -> String {
    text.split_whitespace().collect()
}

/// The rules of a file, of all its groups.
fn rules(file: &str) -> Vec<Value> {
    let groups = yaml(file)["groups"].as_array().unwrap().clone();
    groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn promtool_accepts_the_configuration_and_the_rules() {
    let report = content("promtool", &["check", "config", "prometheus/prometheus.yml"]).await;
    assert!(report.contains("2 rule files found"), "{report}");
    for file in files("prometheus/rules") {
        let report = content("promtool", &["check", "rules", "--lint-fatal", &file]).await;
        assert!(report.contains("SUCCESS"), "{report}");
    }
}

#[tokio::test]
#[ignore = "needs promtool; run by make test"]
async fn the_unit_tests_of_the_rules_pass() {
    let tests = files("prometheus/tests");
    assert!(tests.len() >= 2);
    for file in tests {
        content("promtool", &["test", "rules", &file]).await;
        // They would have told: whatever is expected, something else is not.
        let text = fs::read_to_string(&file).unwrap();
        let other = text.replacen(
            "exp_samples: [{labels: '{}', value: ",
            "exp_samples: [{labels: '{}', value: 9",
            1,
        );
        let other = other.replacen("exp_alerts: []", "exp_alerts: [{}]", 1);
        assert_ne!(text, other);
        let rules = env::current_dir().unwrap().join("prometheus/rules");
        let dir = tempfile::tempdir().unwrap();
        let broken = dir.path().join("broken.yml");
        fs::write(&broken, other.replace("../rules", rules.to_str().unwrap())).unwrap();
        let (passed, report) = tool("promtool", &["test", "rules", broken.to_str().unwrap()]).await;
        assert!(!passed, "{report}");
    }
}

/// The unit tests would not tell: their series rise steadily, and so have one rate in every window.
#[test]
fn what_is_recorded_over_several_windows_differs_in_nothing_else() {
    let rules = rules("prometheus/rules/recording.yml");
    for name in ["namespace:requests:rate", "namespace:requests_failed:ratio_rate"] {
        let over = |window: &str| {
            let record = format!("{name}{window}");
            let mut found = rules.iter().filter(|rule| rule["record"] == *record);
            let query = found.next().unwrap_or_else(|| panic!("no {record}"))["expr"].as_str();
            query.unwrap().to_owned()
        };
        let shortest = over("5m");
        for window in ["30m", "1h", "6h"] {
            assert_eq!(over(window), shortest.replace("5m", window), "{name}{window}");
        }
    }
}

#[test]
fn every_alert_is_tested_firing_and_quiet() {
    let tests = yaml("prometheus/tests/alerts.yml");
    let (mut firing, mut quiet) = (BTreeSet::new(), BTreeSet::new());
    for test in tests["tests"].as_array().unwrap() {
        for alert in test["alert_rule_test"].as_array().into_iter().flatten() {
            let name = alert["alertname"].as_str().unwrap().to_owned();
            let silent = alert["exp_alerts"].as_array().unwrap().is_empty();
            if silent {
                quiet.insert(name)
            } else {
                firing.insert(name)
            };
        }
    }
    let alerts: BTreeSet<_> = rules("prometheus/rules/alerts.yml")
        .iter()
        .map(|rule| rule["alert"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!((&firing, &quiet), (&alerts, &alerts));
}

#[test]
fn every_alert_has_its_heading_in_the_runbook() {
    let runbook = fs::read_to_string("docs/runbook.md").unwrap();
    let headings: Vec<_> = runbook.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    let alerts = rules("prometheus/rules/alerts.yml");
    let names: Vec<_> = alerts.iter().map(|rule| rule["alert"].as_str().unwrap()).collect();
    assert_eq!(headings, names, "in the order of prometheus/rules/alerts.yml");
    for alert in &alerts {
        let name = alert["alert"].as_str().unwrap();
        let annotations = &alert["annotations"];
        let link = format!("docs/runbook.md#{}", name.to_lowercase());
        assert_eq!(annotations["runbook"], link);
        for text in ["summary", "description"] {
            assert!(annotations[text].as_str().is_some_and(|text| text.ends_with('.')), "{name}");
        }
        let severity = alert["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning"].contains(&severity), "{name}: {severity}");
        let (_, section) = runbook.split_once(&format!("## {name}\n")).unwrap();
        assert!(
            section.split("\n## ").next().unwrap().trim().len() > 200,
            "{name} says what to do"
        );
    }
}

#[test]
fn the_operator_has_a_copy_of_the_rules() {
    let copy = yaml("k8s/components/prometheusrule/prometheusrule.yaml");
    let mut groups = Vec::new();
    for file in ["prometheus/rules/recording.yml", "prometheus/rules/alerts.yml"] {
        groups.extend(yaml(file)["groups"].as_array().unwrap().clone());
    }
    let copied = copy["spec"]["groups"].as_array().unwrap();
    assert_eq!(*copied, groups, "run prometheus/embed-rules.sh");
}

#[test]
fn the_chart_has_a_copy_of_the_rules() {
    let files = &yaml("prometheus/values.yaml")["serverFiles"];
    let hint = "run prometheus/embed-rules.sh";
    assert_eq!(files["recording_rules.yml"], yaml("prometheus/rules/recording.yml"), "{hint}");
    assert_eq!(files["alerting_rules.yml"], yaml("prometheus/rules/alerts.yml"), "{hint}");
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_query_of_production_is_the_tested_one_and_the_readmes() {
    let (_, production, _) = triggers("k8s/overlays/production").await.remove(0);
    let tests = yaml("prometheus/tests/exact-count.yml");
    let mut tested = 0;
    for test in tests["tests"].as_array().unwrap() {
        for expression in test["promql_expr_test"].as_array().unwrap() {
            let query = expression["expr"].as_str().unwrap();
            // The one without the guard by the start time shows what the guard is for.
            if query.contains("process_start_time_seconds") {
                assert_eq!(squeezed(query), squeezed(&production));
                tested += 1;
            }
        }
    }
    assert!(tested > 15, "{tested}");

    let readme = fs::read_to_string("README.md").unwrap();
    let block = readme.split("```promql\n").nth(1).unwrap().split("```").next().unwrap();
    let general = squeezed(&production)
        .replace(r#"namespace="orders","#, "")
        .replace("1m", "5m")
        .replace("75", "315");
    assert_eq!(general, squeezed(block));
}

#[test]
fn every_selector_of_the_rules_names_the_job() {
    for file in ["prometheus/rules/recording.yml", "prometheus/rules/alerts.yml"] {
        for rule in rules(file) {
            let query = rule["expr"].as_str().unwrap();
            let of_ours = [
                "product_order_",
                "process_start_time_",
                "grpc_server_",
                "http_request",
                "requests_",
                "request_",
                "order_store_",
                "log_lines_",
                "up{",
            ];
            for selector in query.split(['(', ' ', '\n']).filter(|word| word.contains('{')) {
                let ours = of_ours.iter().any(|prefix| selector.starts_with(prefix));
                assert_eq!(ours, selector.contains(r#"job="order-service""#), "{selector}");
            }
        }
    }
    assert_eq!(
        yaml("prometheus/prometheus.yml")["scrape_configs"][0]["job_name"],
        json!("order-service")
    );
}
