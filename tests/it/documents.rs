//! The documents: their links lead somewhere, their commands are run, and what they say of flags is what
//! the programs say.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use regex::Regex;

use crate::support::server_command;

/// The Markdown files of the repository.
fn documents() -> Vec<PathBuf> {
    let mut documents = Vec::new();
    let mut folders = vec![PathBuf::from(".")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && name != "target" && name != "node_modules" && !name.starts_with('.')
            {
                folders.push(path);
            } else if name.ends_with(".md") {
                documents.push(path);
            }
        }
    }
    assert!(documents.len() >= 5, "{documents:?}");
    documents
}

/// A document without its blocks of code, and those blocks by language.
fn parted(text: &str) -> (String, Vec<(String, String)>) {
    let mut prose = String::new();
    let mut blocks: Vec<(String, String)> = Vec::new();
    let mut within = false;
    for line in text.lines() {
        if let Some(language) = line.trim_start().strip_prefix("```") {
            if !within {
                blocks.push((language.to_owned(), String::new()));
            }
            within = !within;
        } else {
            let part = if within { &mut blocks.last_mut().unwrap().1 } else { &mut prose };
            part.push_str(line);
            part.push('\n');
        }
    }
    assert!(!within, "a block of code has no end");
    (prose, blocks)
}

/// The anchors of a document's headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let (prose, _) = parted(text);
    let headings = prose.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_relative_link_leads_somewhere() {
    let link = Regex::new(r"\]\(([^) ]+)\)").unwrap();
    let mut followed = 0;
    for document in documents() {
        let (prose, _) = parted(&fs::read_to_string(&document).unwrap());
        for found in link.captures_iter(&prose) {
            let target = &found[1];
            if target.starts_with("http://") || target.starts_with("https://") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = match path {
                "" => document.clone(),
                path => document.parent().unwrap().join(path),
            };
            assert!(file.exists(), "{}: {target}", document.display());
            if !anchor.is_empty() {
                let known = anchors(&fs::read_to_string(&file).unwrap());
                assert!(known.contains(anchor), "{}: {target} of {known:?}", document.display());
            }
            followed += 1;
        }
    }
    assert!(followed >= 20, "{followed}");
}

/// What the README's blocks ask a shell to do: one for each line, continued lines joined, without the
/// comments behind them; of a block of no language, which shows a session, what follows its prompts.
fn commands(readme: &str) -> Vec<String> {
    let (_, blocks) = parted(readme);
    let shell = blocks.iter().filter_map(|(language, block)| match language.as_str() {
        "sh" => Some(block.replace("\\\n", " ")),
        "" => Some(
            block.lines().filter_map(|line| line.strip_prefix("$ ")).collect::<Vec<_>>().join("\n")
                + "\n",
        ),
        _ => None,
    });
    let joined = shell.collect::<String>();
    let comment = Regex::new(r"(^| )#.*$").unwrap();
    let spaces = Regex::new(" +").unwrap();
    let lines = joined.lines().map(|line| comment.replace(line, "").trim().to_owned());
    let lines = lines.map(|line| spaces.replace_all(&line, " ").into_owned());
    lines.filter(|line| !line.is_empty()).collect()
}

/// Commands that need a cluster, a container engine or a chart, which no test has: by their beginning.
const ELSEWHERE: [&str; 7] = [
    "kubectl ",
    "watch kubectl ",
    "helm ",
    "docker ",
    "kind ",
    "minikube ",
    "cp .env.example .env",
];

/// Loops over calls through a port-forward, which need a cluster, too.
const THROUGH_A_PORT_FORWARD: [&str; 1] =
    ["for i in $(seq 30); do curl -s http://127.0.0.1:8181/product; echo; done"];

/// Measurements: they give figures for the documents, take long, and decide nothing.
const MEASUREMENTS: [&str; 3] = ["make bench", "make bench-instructions", "make bench-peers"];

/// All others by their beginning, and the file that runs them; it may give other arguments, such as a shorter load.
const RUN_IN: [(&str, &str); 6] = [
    ("cargo run --example place", ".ci/commands"),
    ("make run", ".ci/smoke"),
    ("make load", ".ci/commands"),
    ("make stack", ".ci/commands"),
    ("make picture", ".ci/commands"),
    ("make test", ".ci/run"),
];

#[test]
fn every_command_of_the_readme_is_run_or_needs_a_cluster() {
    let readme = fs::read_to_string("README.md").unwrap();
    let commands = commands(&readme);
    assert!(commands.iter().any(|command| command == "make run"), "{commands:?}");
    assert!(commands.iter().any(|command| command.starts_with("helm upgrade")), "{commands:?}");
    for command in &commands {
        let elsewhere = ELSEWHERE.iter().any(|start| command.starts_with(start))
            || THROUGH_A_PORT_FORWARD.contains(&command.as_str())
            || MEASUREMENTS.contains(&command.as_str());
        let begins = |known: &str| command == known || command.starts_with(&format!("{known} "));
        let run = RUN_IN.iter().find(|(known, _)| begins(known));
        assert!(
            elsewhere || run.is_some(),
            "nothing runs `{command}`, nor is it known to need a cluster"
        );
        if let Some((known, file)) = run {
            let script = fs::read_to_string(file).unwrap();
            let line = |line: &str| {
                let line = line.trim().trim_start_matches("start ");
                line == *known || line.starts_with(&format!("{known} "))
            };
            assert!(script.lines().any(line), "{file} does not run `{known}`");
        }
    }
    // Blocks of other languages than these are read by other tests, or are no commands.
    for (language, block) in parted(&readme).1 {
        let known = ["", "sh", "console", "rust", "promql", "sql", "yaml", "mermaid", "go", "java"];
        assert!(known.contains(&language.as_str()), "{language}: {block}");
    }
}

#[test]
fn every_make_target_that_a_document_names_is_one() {
    let makefile = fs::read_to_string("Makefile").unwrap();
    let target = Regex::new("(?m)^([a-z-]+):").unwrap();
    let targets: BTreeSet<_> =
        target.captures_iter(&makefile).map(|found| found[1].to_owned()).collect();
    let named = Regex::new("(?m)(?:^|`)make ([a-z-]+)").unwrap();
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for found in named.captures_iter(&text) {
            assert!(targets.contains(&found[1]), "{}: make {}", document.display(), &found[1]);
        }
    }
}

/// What `--help` says of each flag: its variable and its default, if any.
async fn flags() -> BTreeMap<String, (String, Option<String>)> {
    let output = server_command(&["--help"]).output().await.unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let flag = Regex::new(r"(?m)^ +--([a-z-]+)").unwrap();
    let starts = flag.captures_iter(&help);
    let starts: Vec<_> = starts.map(|f| (f[1].to_owned(), f.get(0).unwrap().start())).collect();
    let mut flags = BTreeMap::new();
    for (i, (name, start)) in starts.iter().enumerate() {
        let end = starts.get(i + 1).map_or(help.len(), |(_, end)| *end);
        let about = &help[*start..end];
        let bracketed = |what: &str| {
            let (_, rest) = about.split_once(&format!("[{what}: "))?;
            Some(rest.split(']').next().unwrap().to_owned())
        };
        if let Some(variable) = bracketed("env") {
            let variable = variable.split('=').next().unwrap().to_owned();
            flags.insert(format!("--{name}"), (variable, bracketed("default")));
        }
    }
    flags
}

#[tokio::test]
async fn the_table_of_settings_is_the_help() {
    let readme = fs::read_to_string("README.md").unwrap();
    let (_, section) = readme.split_once("\n## Settings\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let quoted = Regex::new("`([^`]*)`").unwrap();
    let mut table = BTreeMap::new();
    for row in section.lines().filter(|line| line.starts_with("| `--")) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let all = |cell: &str| -> Vec<String> {
            quoted.captures_iter(cell).map(|found| found[1].to_owned()).collect()
        };
        let (flags, variables) = (all(cells[1]), all(cells[2]));
        assert_eq!(flags.len(), variables.len(), "{row}");
        let default = match cells[3] {
            "none" => None,
            "available cores" => Some("one per available core".to_owned()),
            cell => Some(all(cell)[0].clone()),
        };
        for (flag, variable) in flags.into_iter().zip(variables) {
            assert!(cells[4].len() > 5, "{row}");
            table.insert(flag, (variable, default.clone()));
        }
    }
    let mut told = flags().await;
    // It has no row: it stands in the one of the flag that it belongs to.
    let with_another = told.remove("--final-scrapes").unwrap();
    assert!(section.contains("`--final-scrapes` (`ORDER_FINAL_SCRAPES`, default 1)"));
    assert_eq!(with_another, ("ORDER_FINAL_SCRAPES".to_owned(), Some("1".to_owned())));
    assert_eq!(table, told);
}

#[tokio::test]
async fn every_flag_that_a_document_names_is_one() {
    let mut known: BTreeSet<String> = flags().await.into_keys().collect();
    let load =
        tokio::process::Command::new(env!("CARGO_BIN_EXE_order-load")).arg("--help").output();
    let help = String::from_utf8(load.await.unwrap().stdout).unwrap();
    let flag = Regex::new("(--[a-z][a-z-]*)").unwrap();
    known.extend(flag.captures_iter(&help).map(|found| found[1].to_owned()));
    // Of others' programs.
    known.extend(["--test", "--include-ignored", "--help"].map(str::to_owned));
    let named = Regex::new(r"`(--[a-z][a-z-]*)[^`]*`").unwrap();
    for document in documents().iter().filter(|document| !document.ends_with("CHANGELOG.md")) {
        let (prose, _) = parted(&fs::read_to_string(document).unwrap());
        for found in named.captures_iter(&prose) {
            assert!(known.contains(&found[1]), "{}: {}", document.display(), &found[1]);
        }
    }
}
