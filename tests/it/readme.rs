//! The README, taken literally: its console blocks are run in order against a server on the default
//! ports, and print what it says they print.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Stdio,
};

use regex::Regex;
use tokio::process::Command;

use crate::support::{Process, server_command};

/// A command of the README and what it prints.
struct Step {
    command: String,
    output: String,
}

/// The steps of all ```` ```console ```` blocks: lines after `$ ` are commands, all others output.
fn steps(readme: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for block in readme.split("```console\n").skip(1) {
        let block = block.split("```").next().unwrap();
        for line in block.lines() {
            match line.strip_prefix("$ ") {
                Some(command) => {
                    steps.push(Step { command: command.to_owned(), output: String::new() });
                }
                None => {
                    let step = steps.last_mut().expect("a block begins with a command");
                    step.output.push_str(line);
                    step.output.push('\n');
                }
            }
        }
    }
    steps
}

/// The text with what differs from run to run (ids, times, tokens) replaced by its name.
fn normalised(text: &str) -> String {
    let mut text = text.trim_end().to_owned();
    for (pattern, name) in [
        (r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", "ID"),
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "TIME"),
        (r#"(next_?[pP]age_?[tT]oken": ?")[A-Za-z0-9_-]{22}""#, "${1}TOKEN\""),
    ] {
        text = Regex::new(pattern).unwrap().replace_all(&text, name).into_owned();
    }
    text
}

/// A row of the table of metrics: name, type, labels, and the example query.
pub struct MetricRow {
    pub name: String,
    pub kind: String,
    pub labels: BTreeSet<String>,
    pub example: String,
}

/// The table of the section "Metrics".
pub fn metric_rows() -> Vec<MetricRow> {
    let readme = std::fs::read_to_string("README.md").unwrap();
    let (_, section) = readme.split_once("\n## Metrics\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let unquoted = |cell: &str| cell.trim().trim_matches('`').to_owned();
    rows.map(|row| {
        let cells: Vec<_> = row.trim_end_matches('|').split('|').collect();
        let [name, kind, labels, _, example] = &cells[..] else { panic!("{row}") };
        let labels = labels.split(',').map(unquoted).filter(|label| !label.is_empty()).collect();
        MetricRow { name: unquoted(name), kind: unquoted(kind), labels, example: unquoted(example) }
    })
    .collect()
}

#[tokio::test]
async fn the_table_of_metrics_is_the_live_page() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let page = server.scrape().await.0;
    let told: BTreeMap<_, _> =
        metric_rows().into_iter().map(|row| (row.name, (row.kind, row.labels))).collect();

    let mut live: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
    for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        live.insert(name.to_owned(), (kind.to_owned(), BTreeSet::new()));
    }
    let label = Regex::new("([a-z_]+)=\"").unwrap();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let (series, _) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|part| {
            name.strip_suffix(part)
                .filter(|family| live.get(*family).is_some_and(|f| f.0 == "histogram"))
        });
        let (_, names) = live.get_mut(family.unwrap_or(name)).unwrap();
        let found = label.captures_iter(labels).map(|found| found[1].to_owned());
        names.extend(found.filter(|name| name != "le"));
    }
    assert_eq!(told, live);
}

async fn shell(command: &str, dir: &Path) -> (String, String) {
    let mut shell = Command::new("bash");
    shell.args(["-c", command]).current_dir(dir).stdin(Stdio::null());
    let output = shell.output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(output.stdout), text(output.stderr))
}

#[tokio::test]
#[ignore = "needs grpcurl and the ports 8181 and 9464; run by make test"]
async fn every_command_of_the_readme_prints_what_it_says() {
    let readme = std::fs::read_to_string("README.md").unwrap();
    let steps = steps(&readme);
    assert!(steps.iter().filter(|step| step.command.contains("grpcurl")).count() >= 4);
    assert!(steps.iter().filter(|step| step.command.contains("curl 127")).count() >= 1);

    let dir = tempfile::tempdir().unwrap();
    let mut server = server_command(&[]).current_dir(dir.path()).spawn().unwrap();
    let health =
        "for i in $(seq 600); do curl -sf 127.0.0.1:9464/readyz && exit; sleep 0.1; done; exit 1";
    assert_eq!(shell(health, dir.path()).await.0, "ok\n");
    for Step { command, output } in &steps {
        let (stdout, stderr) = shell(command, dir.path()).await;
        assert_eq!(normalised(&stdout), normalised(output), "$ {command}\n{stderr}");
    }

    // What the README promises of those orders: they are there after kill -9 and a restart.
    let before =
        shell("grpcurl -plaintext 127.0.0.1:8181 orders.v1.OrderService/List", dir.path()).await.0;
    assert!(before.matches("orderId").count() >= 5, "{before}");
    server.kill().await.unwrap();
    let server = Process::start_in(dir.path(), &[]).await;
    let list = format!("grpcurl -plaintext {} orders.v1.OrderService/List", server.api);
    assert_eq!(shell(&list, dir.path()).await.0, before);
}
