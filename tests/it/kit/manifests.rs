//! The manifests: they render, they are valid to the letter, and their numbers agree.

use std::{env, fs};

use serde_json::{Value, json};

use super::{
    APPLIED, content, documents, environment, files, manifest, pod, rendered, tool, triggers, yaml,
};

/// A quantity of CPU, in cores.
fn cores(quantity: &Value) -> f64 {
    let quantity = quantity.as_str().unwrap();
    match quantity.strip_suffix('m') {
        Some(thousandths) => thousandths.parse::<f64>().unwrap() / 1000.0,
        None => quantity.parse().unwrap(),
    }
}

fn seconds(duration: &str) -> u64 {
    humantime::parse_duration(duration).unwrap().as_secs()
}

/// The Deployments of the overlays.
async fn deployments() -> Vec<Value> {
    let mut deployments = Vec::new();
    for overlay in ["k8s/overlays/demo", "k8s/overlays/production"] {
        let manifests = rendered(overlay).await;
        deployments.push(manifest(&manifests, "Deployment", "order-service").clone());
    }
    deployments
}

#[tokio::test]
#[ignore = "needs kustomize and kubernetes-validate; run by make test"]
async fn everything_that_is_applied_is_strictly_valid() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rendered.yaml");
    let path = file.to_str().unwrap();
    for directory in APPLIED {
        let rendered = content("kustomize", &["build", directory]).await;
        fs::write(&file, &rendered).unwrap();
        let report = content("kubernetes-validate", &["--strict", path]).await;
        let own = documents(&rendered).iter().filter(|m| m["kind"] == "ScaledObject").count();
        let unknown = report.lines().filter(|line| line.starts_with("WARN"));
        assert_eq!(unknown.count(), own, "kinds that no schema was found for: {report}");

        // It would have told.
        fs::write(&file, rendered.replace("readOnlyRootFilesystem", "readonlyRootFilesystem"))
            .unwrap();
        assert!(!tool("kubernetes-validate", &["--strict", path]).await.0);
    }
}

#[tokio::test]
#[ignore = "needs kustomize and check-jsonschema; run by make test"]
async fn the_custom_resources_are_strictly_valid() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("resource.json");
    let check = async |resource: &Value, schema: &str| {
        fs::write(&file, resource.to_string()).unwrap();
        let schema = format!("tests/kit/{schema}.schema.json");
        tool("check-jsonschema", &["--schemafile", &schema, file.to_str().unwrap()]).await
    };
    let mut scaled = Vec::new();
    for overlay in ["k8s/overlays/demo", "k8s/overlays/production"] {
        let manifests = rendered(overlay).await;
        scaled.push(manifest(&manifests, "ScaledObject", "order-service").clone());
    }
    let monitor = yaml("k8s/components/podmonitor/podmonitor.yaml");
    let rule = yaml("k8s/components/prometheusrule/prometheusrule.yaml");
    for (resource, schema) in scaled
        .iter()
        .map(|scaled| (scaled, "scaledobject"))
        .chain([(&monitor, "podmonitor"), (&rule, "prometheusrule")])
    {
        let (valid, report) = check(resource, schema).await;
        assert!(valid, "{report}");
    }
    // It would have told.
    for (path, value) in [
        (
            "/spec/triggers/0/metadata",
            json!({"serverAddress": "http://x", "query": "1", "metricName": "x", "threshold": "1"}),
        ),
        ("/spec/triggers/0/metadata/threshold", json!(20)),
        ("/spec/fallback/behavior", json!("currentReplicasIfHigh")),
        (
            "/spec/advanced/horizontalPodAutoscalerConfig/behavior/scaleDown",
            json!({"stabilisationWindowSeconds": 1}),
        ),
    ] {
        let mut bad = scaled[1].clone();
        *bad.pointer_mut(path).unwrap() = value;
        assert!(!check(&bad, "scaledobject").await.0, "{path}");
    }
    let mut bad = monitor;
    bad["spec"]["podMetricsEndpoints"][0]["scrape_interval"] = json!("5s");
    assert!(!check(&bad, "podmonitor").await.0);
    let mut bad = rule;
    bad["spec"]["groups"][0]["rules"][0]["expression"] = json!("up");
    assert!(!check(&bad, "prometheusrule").await.0);
}

/// What kustomize makes of `production` with components added and patched.
async fn adapted(components: &[&str], patch: Option<&str>) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    // kustomize takes relative paths only.
    let up = "../".repeat(dir.path().canonicalize().unwrap().components().count() - 1);
    let here = env::current_dir().unwrap().canonicalize().unwrap();
    let k8s = format!("{up}{}/k8s", here.to_str().unwrap().trim_start_matches('/'));
    let component = |name: &&str| format!("{k8s}/components/{name}");
    let mut kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [format!("{k8s}/overlays/production")],
        "components": components.iter().map(component).collect::<Vec<_>>(),
    });
    if let Some(patch) = patch {
        fs::write(dir.path().join("patch.yaml"), patch).unwrap();
        kustomization["patches"] = json!([{"path": "patch.yaml"}]);
    }
    fs::write(dir.path().join("kustomization.yaml"), kustomization.to_string()).unwrap();
    rendered(dir.path().to_str().unwrap()).await
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_components_fit_into_an_overlay() {
    let components = ["postgres", "podmonitor", "prometheusrule", "grafana"];
    let manifests = adapted(&components, None).await;
    manifest(&manifests, "PodMonitor", "order-service");
    manifest(&manifests, "PrometheusRule", "order-service");
    let policy = manifest(&manifests, "NetworkPolicy", "order-service");
    let from = &policy["spec"]["ingress"][1]["from"][0];
    let namespace = &from["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"];
    assert_eq!(namespace, "monitoring", "the Operator's Prometheus");
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_readme_mounts_a_tls_secret() {
    let readme = fs::read_to_string("README.md").unwrap();
    let (_, tls) = readme.split_once("**TLS** for the API").unwrap();
    let patch = tls.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    let manifests = adapted(&[], Some(patch)).await;
    let pod = pod(manifest(&manifests, "Deployment", "order-service"));
    let mount = &pod["containers"][0]["volumeMounts"][0];
    let settings = environment(pod);
    for (setting, file) in [("ORDER_TLS_CERT", "tls.crt"), ("ORDER_TLS_KEY", "tls.key")] {
        let path = format!("{}/{file}", mount["mountPath"].as_str().unwrap());
        assert_eq!(settings[setting].as_ref(), Some(&path));
    }
    assert_eq!(pod["volumes"][0]["name"], mount["name"]);
    // What was there is there still.
    assert!(settings.contains_key("ORDER_MAX_IN_FLIGHT"));
}

#[test]
fn what_the_readme_applies_is_there() {
    let readme = fs::read_to_string("README.md").unwrap();
    let mut paths = 0;
    for line in readme.lines().filter(|line| line.starts_with("kubectl ")) {
        let mut words = line.split_whitespace();
        while let Some(word) = words.next() {
            if ["-k", "-f"].contains(&word) && !line.contains("logs") {
                let path = words.next().unwrap();
                assert!(fs::exists(path).unwrap(), "{line}");
                paths += 1;
            }
        }
    }
    assert!(paths >= 4, "{paths}");
}

#[test]
fn what_the_readme_waits_for_is_one_resource_at_a_time() {
    // kubectl: "you may only specify a single resource type".
    let readme = fs::read_to_string("README.md").unwrap();
    let waits = readme.lines().filter_map(|line| line.split_once(" rollout status "));
    let waits: Vec<_> = waits.map(|(_, resources)| resources.split(' ').count()).collect();
    assert_eq!(waits, [1, 1]);
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn a_pod_that_ends_is_given_the_time_it_takes() {
    for deployment in deployments().await {
        let environment = environment(pod(&deployment));
        let of = |name: &str| seconds(environment[name].as_deref().unwrap());
        let takes =
            of("ORDER_DRAIN_DELAY") + of("ORDER_DRAIN_TIMEOUT") + of("ORDER_FINAL_SCRAPE_TIMEOUT");
        let given = pod(&deployment)["terminationGracePeriodSeconds"].as_u64().unwrap();
        assert!(given >= takes + 5, "{given} s are given, {takes} s taken");
        // The last scrape comes in time.
        let scrape = &yaml("prometheus/values.yaml")["scrapeConfigs"]["order-service"];
        let interval = seconds(scrape["scrape_interval"].as_str().unwrap());
        assert!(of("ORDER_FINAL_SCRAPE_TIMEOUT") > interval);
    }
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn a_thread_for_each_core_that_is_requested() {
    for deployment in deployments().await {
        let container = &pod(&deployment)["containers"][0];
        let requested = cores(&container["resources"]["requests"]["cpu"]).ceil();
        let threads = environment(pod(&deployment))["ORDER_WORKER_THREADS"].clone().unwrap();
        assert_eq!(threads.parse::<f64>().unwrap(), requested);
        assert_eq!(container["resources"]["limits"]["cpu"], Value::Null, "no CPU limit");
        assert!(container["resources"]["limits"]["memory"].is_string());
    }
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_deployment_leaves_its_replicas_to_the_autoscaler_and_keeps_its_capacity() {
    for deployment in deployments().await {
        assert_eq!(deployment["spec"]["replicas"], Value::Null);
        assert_eq!(deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"], 0);
        let spread = pod(&deployment)["topologySpreadConstraints"].as_array().unwrap();
        assert!(!spread.is_empty());
    }
    let manifests = rendered("k8s/overlays/production").await;
    let budget = manifest(&manifests, "PodDisruptionBudget", "order-service");
    assert_eq!(budget["spec"]["maxUnavailable"], 1);
    assert_eq!(budget["spec"]["unhealthyPodEvictionPolicy"], "AlwaysAllow");
    let headless = manifest(&manifests, "Service", "order-service-headless");
    assert_eq!(headless["spec"]["clusterIP"], "None");
    assert!(
        !manifests.iter().any(|manifest| manifest["kind"] == "Secret"),
        "production's database URL comes from a Secret that is there already"
    );
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn every_pod_keeps_to_the_restricted_profile() {
    for directory in APPLIED {
        let manifests = rendered(directory).await;
        let pods = manifests.iter().filter(|m| m["spec"]["template"]["spec"].is_object());
        let mut seen = 0;
        for pod in pods.map(pod) {
            seen += 1;
            assert_eq!(pod["automountServiceAccountToken"], false, "{pod}");
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{pod}");
            assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{pod}");
            for container in pod["containers"].as_array().unwrap() {
                let context = &container["securityContext"];
                assert_eq!(context["allowPrivilegeEscalation"], false, "{container}");
                assert_eq!(context["readOnlyRootFilesystem"], true, "{container}");
                assert_eq!(context["capabilities"], json!({"drop": ["ALL"]}), "{container}");
                assert!(container["resources"]["requests"]["memory"].is_string(), "{container}");
            }
        }
        assert!(seen > 0);
    }
    let manifests = rendered("k8s/overlays/production").await;
    let labels = &manifest(&manifests, "Namespace", "orders")["metadata"]["labels"];
    assert_eq!(labels["pod-security.kubernetes.io/enforce"], "restricted");
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_image_is_named_in_one_place() {
    let places: Vec<_> = files("k8s")
        .into_iter()
        .filter(|file| fs::read_to_string(file).unwrap().contains("newName:"))
        .collect();
    assert_eq!(places, ["k8s/components/image/kustomization.yaml"]);
    let image = &yaml(&places[0])["images"][0];
    assert_eq!(image["newTag"], env!("CARGO_PKG_VERSION"), "the version of Cargo.toml");
    let expected = format!("{}:{}", image["newName"].as_str().unwrap(), env!("CARGO_PKG_VERSION"));
    for directory in APPLIED {
        for manifest in rendered(directory).await {
            let containers = pod(&manifest)["containers"].as_array().cloned().unwrap_or_default();
            for container in containers.iter().filter(|container| container["name"] != "postgres") {
                assert_eq!(container["image"], expected, "{directory}");
            }
        }
    }
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_numbers_of_the_autoscaler_agree_with_the_deployment() {
    let production = rendered("k8s/overlays/production").await;
    let environment = environment(pod(manifest(&production, "Deployment", "order-service")));
    let setting = |name: &str| environment[name].as_ref().unwrap().parse::<f64>().unwrap();
    let spec = &manifest(&production, "ScaledObject", "order-service")["spec"];
    let number = |value: &Value| value.as_f64().unwrap();

    let triggers = triggers("k8s/overlays/production").await;
    let [(first, exact, _), (second, in_flight, threshold)] = &triggers[..] else { panic!() };
    assert_eq!((first.as_str(), second.as_str()), ("orders", "in-flight"));
    assert_eq!(*threshold, 0.6 * setting("ORDER_MAX_IN_FLIGHT"));
    assert_eq!(in_flight, r#"sum(requests_in_flight{namespace="orders",job="order-service"})"#);

    // A window of at least four scrapes and, before it, three, everywhere the same.
    let scrape = &yaml("prometheus/values.yaml")["scrapeConfigs"]["order-service"];
    let interval = seconds(scrape["scrape_interval"].as_str().unwrap());
    let window = exact.split_once('[').unwrap().1.split_once(']').unwrap().0;
    assert!(seconds(window) >= 4 * interval);
    let before = 3 * interval;
    let both = seconds(window) + before;
    for (part, count) in [
        (format!("[{window}]"), 4),
        (format!("[{before}s] offset {window}"), 2),
        (format!("[{both}s]"), 4),
        (format!("time() - {both})"), 1),
    ] {
        assert_eq!(exact.matches(&part).count(), count, "{part}");
    }

    // docs/database.md: a replica and the one more of a roll-out may hold twice their pools while the
    // database is slow. PostgreSQL's default of 100 connections has three reserved and one for oneself.
    let pool = setting("ORDER_DATABASE_POOL");
    let replicas = number(&spec["maxReplicaCount"]) + 1.0;
    assert!(replicas * 2.0 * pool <= 96.0, "{replicas} replicas");
    // Or, while it answers, seven more replicas that are ending.
    assert!((replicas + 7.0) * pool <= 96.0, "{replicas} replicas");

    assert!(number(&spec["minReplicaCount"]) >= 2.0);
    assert!(number(&spec["fallback"]["replicas"]) >= number(&spec["minReplicaCount"]));
    assert_eq!(spec["fallback"]["behavior"], "currentReplicasIfHigher");
    let config = &spec["advanced"]["horizontalPodAutoscalerConfig"];
    assert_eq!(spec["advanced"]["scalingModifiers"], Value::Null, "it can switch the fallback off");
    for direction in ["scaleUp", "scaleDown"] {
        assert!(config["behavior"][direction]["policies"].is_array(), "{direction}");
    }
    for trigger in spec["triggers"].as_array().unwrap() {
        assert_eq!(trigger["metricType"], "AverageValue");
        assert_eq!(trigger["metadata"]["ignoreNullValues"], "false");
    }
}

#[tokio::test]
#[ignore = "needs kustomize; run by make test"]
async fn the_demo_has_the_numbers_of_the_tutorial() {
    let demo = rendered("k8s/overlays/demo").await;
    let spec = &manifest(&demo, "ScaledObject", "order-service")["spec"];
    assert_eq!((&spec["minReplicaCount"], &spec["maxReplicaCount"]), (&json!(1), &json!(5)));
    let config = &spec["advanced"]["horizontalPodAutoscalerConfig"];
    assert_eq!(config["behavior"]["scaleDown"]["stabilizationWindowSeconds"], 30);
    let query = "sum(rate(product_order_total[5m])) * 300".to_owned();
    assert_eq!(triggers("k8s/overlays/demo").await, [("orders".to_owned(), query, 20.0)]);
    let environment = environment(pod(manifest(&demo, "Deployment", "order-service")));
    assert_eq!(environment["ORDER_PROCESSING_DELAY"].as_deref(), Some("100ms"));
}
