//! What the Grafana dashboard's file must be: importable as it stands, laid out, and within the rules of
//! Grafana's dashboard-linter (whose Go module cannot be installed: it replaces dependencies). Where the
//! dashboard departs from a rule, the reason stands beside it.

use std::{collections::BTreeSet, fs, process::Stdio};

use regex::Regex;
use serde_json::Value;
use tokio::process::Command;

/// A query of a panel.
pub struct Target {
    pub panel: String,
    pub legend: String,
    pub query: String,
}

/// The file as it stands.
pub fn dashboard() -> Value {
    serde_json::from_str(&fs::read_to_string("grafana/dashboard.json").unwrap()).unwrap()
}

/// The graphs and heatmaps, without the rows' headings.
pub fn panels(dashboard: &Value) -> Vec<&Value> {
    dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row").collect()
}

pub fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value[name].as_str().unwrap_or_else(|| panic!("{name} of {value}"))
}

/// Every query of every panel.
pub fn targets(dashboard: &Value) -> Vec<Target> {
    let of_panel = |panel: &Value| {
        let targets = panel["targets"].as_array().unwrap().iter();
        let target = |target: &Value| Target {
            panel: text(panel, "title").to_owned(),
            legend: text(target, "legendFormat").to_owned(),
            query: text(target, "expr").to_owned(),
        };
        targets.map(target).collect::<Vec<_>>()
    };
    panels(dashboard).into_iter().flat_map(of_panel).collect()
}

/// The variables of one type.
pub fn variables<'d>(dashboard: &'d Value, kind: &str) -> Vec<&'d Value> {
    let list = dashboard["templating"]["list"].as_array().unwrap().iter();
    list.filter(|variable| variable["type"] == kind).collect()
}

/// A metric with its matchers in a query, what follows it (a range, an offset) and the function that it
/// is the argument of.
struct Selector {
    metric: String,
    matchers: String,
    range: Option<String>,
    function: Option<String>,
}

fn selectors(query: &str) -> Vec<Selector> {
    let selector = Regex::new(r"(?:([a-z_]+)\()?([a-z_]+)\{([^{}]*)\}(?:\[([^\]]+)\])?").unwrap();
    // A brace within a matcher's pattern, as in {6,10}, is not the end of the selector.
    let query =
        Regex::new(r"\{([0-9]+,?[0-9]*)\}").unwrap().replace_all(query, "<$1>").into_owned();
    let found = selector.captures_iter(&query).map(|found| {
        let group = |i| found.get(i).map(|group| group.as_str().to_owned());
        Selector {
            metric: group(2).unwrap(),
            matchers: group(3).unwrap(),
            range: group(4),
            function: group(1),
        }
    });
    found.collect()
}

/// Series of Kubernetes and KEDA come from other jobs and tell of other targets.
fn of_another_job(metric: &str) -> bool {
    metric.starts_with("kube_") || metric.starts_with("keda_")
}

#[test]
fn it_imports_into_any_grafana_as_it_stands() {
    let dashboard = dashboard();
    assert_eq!(dashboard["title"], "Order service");
    assert!(dashboard["schemaVersion"].as_u64().unwrap() >= 39);
    // An import asks for `__inputs`, provisioning does not; an id belongs to one Grafana's database.
    for absent in ["__inputs", "__requires", "id", "version"] {
        assert!(dashboard.get(absent).is_none(), "{absent}");
    }
    // Its address in every Grafana, and what makes a second import overwrite the first.
    assert_eq!(dashboard["uid"], "order-service");
    let file = fs::read_to_string("grafana/dashboard.json").unwrap();
    let uids = Regex::new(r#""uid": "([^"]*)""#).unwrap();
    let uids: BTreeSet<_> = uids.captures_iter(&file).map(|uid| uid[1].to_owned()).collect();
    assert_eq!(uids, BTreeSet::from(["${datasource}", "order-service"].map(str::to_owned)));
}

#[test]
fn its_rows_and_panels_are_laid_out_top_to_bottom() {
    let dashboard = dashboard();
    let headings = dashboard["panels"].as_array().unwrap().iter().filter(|p| p["type"] == "row");
    let titles: Vec<_> = headings.map(|row| text(row, "title")).collect();
    let rows = ["Is it scaling?", "The tutorial's three", "Calls", "Saturation", "Process"];
    assert_eq!(titles, rows);
    let three = ["Request Rate", "Number of Pods", "Average Response Time"];
    let names: Vec<_> = panels(&dashboard).iter().map(|panel| text(panel, "title")).collect();
    assert!(three.iter().all(|name| names.contains(name)), "{names:?}");

    let mut taken = BTreeSet::new();
    let mut ids = BTreeSet::new();
    let mut bottom = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        let at = |side: &str| panel["gridPos"][side].as_u64().unwrap();
        assert!(at("x") + at("w") <= 24, "{panel}");
        for cell in (at("x")..at("x") + at("w"))
            .flat_map(|x| (at("y")..at("y") + at("h")).map(move |y| (x, y)))
        {
            assert!(taken.insert(cell), "{} lies over another", panel["title"]);
        }
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        bottom = bottom.max(at("y") + at("h"));
    }
    assert_eq!(taken.len() as u64, 24 * bottom, "no holes");
}

#[test]
fn rules_of_the_linter_for_the_dashboard_and_its_variables() {
    let dashboard = dashboard();
    // uneditable-dashboard-rule
    assert_eq!(dashboard["editable"], false);
    // template-datasource-rule
    let [datasource] = variables(&dashboard, "datasource")[..] else { panic!("one datasource") };
    assert_eq!(
        (text(datasource, "name"), text(datasource, "label"), text(datasource, "query")),
        ("datasource", "Data source", "prometheus")
    );

    let queried = variables(&dashboard, "query");
    let names: Vec<_> = queried.iter().map(|variable| text(variable, "name")).collect();
    assert_eq!(names, ["namespace", "job", "pod", "instance"]);
    for variable in queried {
        let name = text(variable, "name");
        // template-job-rule, template-instance-rule
        assert_eq!(variable["datasource"]["uid"], "${datasource}");
        assert_eq!(variable["multi"], true, "{name}");
        assert_eq!(variable["includeAll"], true, "{name}");
        let label = name[..1].to_uppercase() + &name[1..];
        assert_eq!(text(variable, "label"), label);
        // Series of a local run have neither namespace nor pod: All must match the absent label too.
        let every = if ["namespace", "pod"].contains(&name) { ".*" } else { ".+" };
        assert_eq!(text(variable, "allValue"), every, "{name}");
        // template-on-time-change-reload-rule
        assert_eq!(variable["refresh"], 2, "{name}");
        // template-label-promql-rule
        let query = text(variable, "query");
        assert!(query.starts_with("label_values(product_order_total"), "{query}");
        assert!(query.ends_with(&format!(", {name})")), "{query}");
    }
}

#[test]
fn rules_of_the_linter_for_panels() {
    let units = ["short", "none", "s", "reqps", "cps", "percentunit", "bytes"];
    for panel in panels(&dashboard()) {
        let title = text(panel, "title");
        // panel-title-description-rule
        assert!(!title.is_empty() && text(panel, "description").len() > 5, "{title}");
        // panel-datasource-rule
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        // panel-units-rule
        assert!(units.contains(&text(&panel["fieldConfig"]["defaults"], "unit")), "{title}");
        // panel-no-targets-rule
        assert!(!panel["targets"].as_array().unwrap().is_empty(), "{title}");
        for target in panel["targets"].as_array().unwrap() {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
            assert!(!text(target, "legendFormat").is_empty(), "{title}");
        }
    }
}

#[test]
fn rules_of_the_linter_for_queries() {
    // The window of the autoscaler and of the exact count, whatever the range that is looked at; one that
    // holds the rare samples of kube-state-metrics; and one longer than the connections' age.
    let fixed = [
        ("Orders against capacity", "5m"),
        ("What KEDA sees", "5m"),
        ("Restarts", "5m"),
        ("Connection age", "10m"),
    ];
    // "Is it scaling?" is asked of all replicas, whichever are chosen; a share is of the calls of all.
    let of_all =
        ["Orders against capacity", "Replicas", "What KEDA sees", "Share of calls by replica"];
    for Target { panel, legend, query } in targets(&dashboard()) {
        let at = format!("{panel}, {legend}");
        let selectors = selectors(&query);
        // None is overlooked: each matches a namespace.
        assert!(!selectors.is_empty(), "{at}: {query}");
        assert_eq!(selectors.len(), query.matches("$namespace").count(), "{at}: {query}");
        for Selector { metric, matchers, range, function } in selectors {
            let of_another_job = of_another_job(&metric);
            for chosen in ["namespace", "job", "pod", "instance"] {
                // target-job-rule, target-instance-rule
                let matched = matchers.contains(&format!("{chosen}=~\"${chosen}\""));
                let needless =
                    ["pod", "instance"].contains(&chosen) && of_all.contains(&panel.as_str());
                assert!(matched || of_another_job || needless, "{at}: {metric} without {chosen}");
            }
            assert!(matchers.contains("namespace=~\"$namespace\""), "{at}: {metric}");

            // target-rate-interval-rule
            let function = function.unwrap_or_default();
            if ["rate", "irate", "increase"].contains(&function.as_str()) {
                let range = range.clone().unwrap_or_else(|| panic!("{at}: {metric}"));
                let fixed = fixed.contains(&(panel.as_str(), range.as_str()));
                // Grafana knows how often this service is scraped, not how often another job's targets are.
                let known = range == "$__rate_interval" && !of_another_job;
                assert!(known || fixed, "{at}: {metric}[{range}]");
            }
            // target-counter-agg-rule. The exact count reads a counter as it stands: that is the point of
            // it.
            let counter = ["_total", "_sum", "_count", "_bucket", "_with_path"];
            if counter.iter().any(|suffix| metric.ends_with(suffix)) {
                let rated = ["rate", "irate", "increase"].contains(&function.as_str());
                let exact = metric == "product_order_total" && query.contains("unless resets(");
                assert!(rated || exact, "{at}: {metric} of {function}");
            }
        }
    }
}

#[test]
fn the_exact_count_is_the_one_of_the_readme() {
    let readme = fs::read_to_string("README.md").unwrap();
    let block = readme.split("```promql\n").nth(1).unwrap().split("```").next().unwrap();
    let chosen = r#"{namespace=~"$namespace", job=~"$job"}"#;
    let expected = block.replace(r#"{job="order-service"}"#, chosen);
    let dashboard = targets(&dashboard());
    let exact: Vec<_> =
        dashboard.iter().filter(|target| target.query.contains("unless resets(")).collect();
    assert_eq!(exact.len(), 2);
    for target in exact {
        assert_eq!(target.query.trim(), expected.trim(), "{}", target.panel);
    }
}

#[tokio::test]
#[ignore = "needs python3; run by make test"]
async fn the_file_is_what_its_generator_prints() {
    let mut generator = Command::new("python3");
    generator.args(["-B", "grafana/dashboard.py"]).stdin(Stdio::null());
    let printed = generator.output().await.expect("python3 is installed");
    assert!(printed.status.success(), "{printed:?}");
    let file = fs::read_to_string("grafana/dashboard.json").unwrap();
    let same = String::from_utf8(printed.stdout).unwrap() == file;
    assert!(same, "run: python3 grafana/dashboard.py > grafana/dashboard.json");
}
