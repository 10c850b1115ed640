#!/usr/bin/env python3
"""Prints the Grafana dashboard: `python3 grafana/dashboard.py > grafana/dashboard.json`.

Standard library only. The rows and panels stand in the order in which one reads them; `queries.py` has
the pieces of PromQL, `panels.py` the shapes of Grafana's file.
"""

import json

from panels import (
    BLUE, DATASOURCE, GREEN, GREY, ORANGE, PURPLE, RED, STACKED, STEPS, YELLOW,
    colour, dashed, heatmap, laid_out, panel, selector,
)
from queries import (
    CHOSEN, DEPLOYMENT, EXACT, GRPC_FAULTS, HPA, KEDA, PODS, READY, WHOLE,
    by_replica, gauge, internal_faults, of_this_service, quantile, rate, ratio, targets, total,
)

HTTP, GRPC = "http_requests_total_with_path", "grpc_server_handled_total"
HTTP_SECONDS, GRPC_SECONDS = "http_request_duration_seconds", "grpc_server_handling_seconds"
ALL_CALLS = f"({total(rate(GRPC))} + {total(rate(HTTP))})"


def scaling():
    orders = "orders in the last 5 minutes"
    capacity = "threshold × ready replicas"
    wanted = "more replicas are wanted while the orders are above"
    keda, exact, plain = "KEDA sees", "exact count", "rate × 300"
    # Of all calls, whichever replicas are chosen: of its own calls each has all.
    of_all = f"({total(rate(GRPC, which=WHOLE))} + {total(rate(HTTP, which=WHOLE))} > 0)"
    share = (
        f"({by_replica(rate(GRPC))} + {by_replica(rate(HTTP))})\n/ on () group_left ()\n{of_all}"
    )
    return [
        panel(
            "Orders against capacity", "short",
            f"New orders of the last 5 minutes, each counted once, and what the ready replicas are meant "
            f"to take: {wanted}. Of all replicas, whichever pods are chosen. The threshold is the selector "
            f"at the top; `production` has a window of its own: enter its threshold × 300 s ÷ its window.",
            (orders, EXACT), (capacity, f"$threshold * ({READY})"),
            width=12, height=9, overrides=[colour(orders, BLUE), dashed(capacity, ORANGE)],
        ),
        panel(
            "Replicas", "none",
            "Desired and ready replicas of the Deployment, and the most that the autoscaler may ask for. "
            "Without kube-state-metrics: the targets that Prometheus knows and those that answer it; the "
            "maximum is then unknown.",
            ("desired", f"sum(kube_deployment_spec_replicas{{{DEPLOYMENT}}}) or count({targets(WHOLE)})"),
            ("ready", READY),
            ("max", f"sum(kube_horizontalpodautoscaler_spec_max_replicas{{{HPA}}})"),
            width=12, height=9, custom=STEPS, decimals=0,
            overrides=[colour("desired", BLUE), colour("ready", GREEN), dashed("max", RED)],
        ),
        panel(
            "What KEDA sees", "short",
            "The value of KEDA's trigger on orders, beside the exact count of the last 5 minutes and the "
            "plain rate, which never counts what a series is born with and so reads too little while "
            "replicas are added. Apart for long: look at KEDA's and Prometheus's targets. KEDA's line "
            "needs the metrics of KEDA's operator in this Prometheus.",
            (keda, f'sum(max by (namespace, exported_namespace) (\n'
                   f'  keda_scaler_metrics_value{{namespace=~"$namespace", {KEDA}}}\n'
                   f'  or keda_scaler_metrics_value{{exported_namespace=~"$namespace", {KEDA}}}))'),
            (exact, EXACT),
            (plain, f"sum(rate(product_order_total{{{WHOLE}}}[5m])) * 300"),
            width=12, height=9,
            overrides=[colour(keda, ORANGE), colour(exact, BLUE), dashed(plain, PURPLE)],
        ),
        panel(
            "Share of calls by replica", "percentunit",
            "How the calls of both protocols spread. A new replica with no share gets no traffic: its "
            "clients hold on to old connections, see --max-connection-age.",
            ("{{replica}}", share),
            width=12, height=9, custom=STACKED, max=1,
        ),
    ]


def tutorial():
    return [
        panel(
            "Request Rate", "reqps",
            "Calls per second by protocol, over all replicas. The tutorial's counts REST alone.",
            ("gRPC", total(rate(GRPC))), ("HTTP", total(rate(HTTP))),
            custom={**STACKED, "fillOpacity": 30},
            overrides=[colour("gRPC", BLUE), colour("HTTP", GREEN)],
        ),
        panel(
            "Number of Pods", "none",
            "Pods that are ready, and those that are not yet or no longer. The tutorial's query counts "
            "series, of which each pod has one whether ready or not. Without kube-state-metrics: the "
            "targets that answer Prometheus, and those that do not.",
            ("ready", f'sum(kube_pod_status_ready{{condition="true", {PODS}}}) or sum({targets()})'),
            ("not ready", f'sum(kube_pod_status_ready{{condition=~"false|unknown", {PODS}}}) '
                          f'or sum(1 - {targets()})'),
            custom={**STEPS, **STACKED}, decimals=0,
            overrides=[colour("ready", GREEN), colour("not ready", ORANGE)],
        ),
        panel(
            "Average Response Time", "s",
            "From a call's arrival to the end of its response, over all replicas: the sum of all times "
            "by the number of calls, not a mean of means. Look at the quantiles below before you trust it.",
            ("gRPC", ratio(total(rate(f"{GRPC_SECONDS}_sum")), total(rate(f"{GRPC_SECONDS}_count")))),
            ("HTTP", ratio(total(rate(f"{HTTP_SECONDS}_sum")), total(rate(f"{HTTP_SECONDS}_count")))),
            limits=[(0.5, YELLOW), (1, RED)],
            overrides=[colour("gRPC", BLUE), colour("HTTP", GREEN)],
        ),
    ]


def calls():
    faults_by_code = total(rate(GRPC, f'grpc_code=~"{GRPC_FAULTS}"'))
    grpc_faults = f"({faults_by_code} + {internal_faults()})"
    http_faults = total(rate(HTTP, 'code=~"5.."'))
    grpc_failed = total(rate(GRPC, 'grpc_code!="OK"'))
    http_callers = total(rate(HTTP, 'code=~"4.."'))
    malformed = total(rate("requests_malformed_total"))
    quantiles = []
    for percent in (99, 90, 50):
        q = percent / 100
        quantiles += [
            (f"p{percent} gRPC {{{{grpc_method}}}}",
             quantile(q, rate(f"{GRPC_SECONDS}_bucket"), "grpc_method")),
            (f"p{percent} {{{{method}}}} {{{{path}}}}",
             quantile(q, rate(f"{HTTP_SECONDS}_bucket"), "method, path")),
        ]
    buckets = (f"{total(rate(f'{GRPC_SECONDS}_bucket'), 'le')}\n+\n"
               f"{total(rate(f'{HTTP_SECONDS}_bucket'), 'le')}")
    return [
        panel(
            "Calls by protocol, method and code", "reqps",
            "Calls per second that ended, by their final status; Canceled and 499 are the caller's doing. "
            "What never happened is not shown.",
            ("gRPC {{grpc_method}} {{grpc_code}}",
             f"{total(rate(GRPC), 'grpc_method, grpc_code')} > 0"),
            ("{{method}} {{url}} {{code}}", f"{total(rate(HTTP), 'method, url, code')} > 0"),
            width=12, height=10, custom=STACKED, table="bottom",
        ),
        panel(
            "Error ratio", "percentunit",
            "Calls that failed, of all. The service's fault: shed, timed out, store unavailable or a bug. "
            "The caller's: invalid, not found, cancelled and the like. Malformed requests, which could not "
            "be decoded or did not arrive whole, are the caller's, whatever gRPC answers them with.",
            ("the service's fault", ratio(f"({grpc_faults} + {http_faults})", ALL_CALLS)),
            ("the caller's", ratio(f"({grpc_failed} - {grpc_faults} + {http_callers})", ALL_CALLS)),
            ("malformed", ratio(malformed, ALL_CALLS)),
            width=12, height=10, limits=[(0.001, YELLOW), (0.01, RED)], up_to=0.02,
            overrides=[
                colour("the service's fault", RED), colour("the caller's", GREY),
                dashed("malformed", PURPLE),
            ],
        ),
        panel(
            "Latency by method", "s",
            "Median, 90th and 99th percentile of the time from arrival to the end of the response, over "
            "all replicas. Methods without calls are not shown.",
            *quantiles,
            width=12, height=10, table="right", limits=[(0.5, YELLOW), (1, RED)],
            custom={"fillOpacity": 0}, up_to=0.01,
        ),
        heatmap(
            "Latency heatmap", "s",
            "All calls by how long they took: two bands tell of two populations, which no mean shows.",
            buckets, height=10,
        ),
    ]


def saturation():
    commit = rate("order_store_commit_duration_seconds_bucket")
    batch = "order_store_batch_orders"
    accepted, refused = "accepted per second", "refused per second: {{reason}}"
    aborted = "aborted per second: {{reason}}"
    return [
        panel(
            "Requests in flight", "short",
            "Requests that arrived and have not ended, against the limit of all replicas together "
            "(--max-in-flight each), beyond which they are shed. The axis is logarithmic.",
            ("{{protocol}}", total(gauge("requests_in_flight"), "protocol")),
            ("limit", total(gauge("requests_in_flight_limit"))),
            width=6, custom={"scaleDistribution": {"type": "symlog", "log": 2, "linearThreshold": 1}},
            overrides=[dashed("limit", RED), colour("grpc", BLUE), colour("http", GREEN)],
        ),
        panel(
            "Shed calls", "reqps",
            "Requests refused at once: too many in flight, the store's queue full, or all of its readers "
            "busy. For long: raise the maximum of replicas, or look at the database.",
            ("{{protocol}} {{reason}}", total(rate("requests_shed_total"), "protocol, reason")),
            width=6, limits=[(1, RED)], up_to=2,
        ),
        panel(
            "Connections", "short",
            "Open API connections, and how many per second are accepted, refused, and aborted by the "
            "HTTP layer for what their peers did. Much the same number accepted as calls made: clients "
            "connect for each call.",
            ("open", total(gauge("connections_open"))),
            (accepted, total(rate("connections_accepted_total"))),
            (refused, f"{total(rate('connections_refused_total'), 'reason')} > 0"),
            (aborted, f"{total(rate('connections_aborted_total'), 'reason')} > 0"),
            width=6, overrides=[colour("open", BLUE), colour(accepted, GREEN)],
        ),
        panel(
            "Connection age", "s",
            "The mean time that a connection stays: how long all were open together in the last 10 "
            "minutes, by how many were accepted then. At most --max-connection-age and 40 s; more, or "
            "no line while some are open, means that calls stick to old replicas.",
            ("mean lifetime", ratio(
                f"10 * sum_over_time({total(gauge('connections_open'))}[10m:10s])",
                total(f"increase(connections_accepted_total{{{CHOSEN}}}[10m])"),
            )),
            width=6, limits=[(180, YELLOW)], overrides=[colour("mean lifetime", PURPLE)],
        ),
        panel(
            "Store queue", "short",
            "Orders that wait for a writer, by replica; at 4096 further ones are shed.",
            ("{{replica}}", by_replica(gauge("order_store_queue_orders"), "max")),
            width=6, limits=[(1024, YELLOW), (4096, RED)], up_to=10,
        ),
        panel(
            "Batch size", "short",
            "Orders in one committed batch. It grows with the load: that is how the store keeps up.",
            ("mean", ratio(total(rate(f"{batch}_sum")), total(rate(f"{batch}_count")))),
            ("p99", quantile(0.99, rate(f"{batch}_bucket"))),
            width=6, limits=[(1024, YELLOW)], overrides=[colour("mean", BLUE), colour("p99", ORANGE)],
        ),
        panel(
            "Commit latency", "s",
            "Time to commit one batch durably; an attempt is given up after a second.",
            *((f"p{percent}", quantile(percent / 100, commit)) for percent in (50, 90, 99)),
            width=6, limits=[(0.25, YELLOW), (1, RED)],
            overrides=[colour("p50", GREEN), colour("p90", BLUE), colour("p99", ORANGE)],
        ),
        panel(
            "Store errors", "cps",
            "Failed attempts to commit a batch, by kind. Conflicts are retried and harmless; `full` "
            "and a lasting `unavailable` are not.",
            ("{{kind}}", total(rate("order_store_errors_total"), "kind")),
            width=6, limits=[(1, RED)], up_to=2,
        ),
    ]


def process():
    builds = total(gauge("order_service_build_info"), "version, revision")
    cpu = of_this_service(rate("process_cpu_seconds_total"))
    memory = of_this_service(gauge("process_resident_memory_bytes"))
    descriptors = of_this_service(f"{gauge('process_open_fds')} / {gauge('process_max_fds')}")
    threads = of_this_service(gauge("process_threads"))
    in_place = of_this_service(f"changes(process_start_time_seconds{{{CHOSEN}}}[5m])")
    # $__rate_interval knows nothing of the job that scrapes kube-state-metrics, usually once a minute.
    restarts = f"increase(kube_pod_container_status_restarts_total{{{PODS}}}[5m])"
    return [
        panel(
            "CPU", "none", "Cores in use, by replica.",
            ("{{replica}}", by_replica(cpu)),
        ),
        panel(
            "Memory", "bytes", "Memory in RAM, by replica.",
            ("{{replica}}", by_replica(memory)),
        ),
        panel(
            "File descriptors", "percentunit",
            "Open file descriptors of those that may be open, by replica.",
            ("{{replica}}", by_replica(descriptors, "max")),
            limits=[(0.8, YELLOW), (0.95, RED)], max=1,
        ),
        panel(
            "Threads", "none", "Threads, by replica.",
            ("{{replica}}", by_replica(threads)), width=6, decimals=0,
        ),
        panel(
            "Log lines dropped", "cps",
            "Log lines that were lost, by replica: the log could not be written, or not fast enough. "
            "No request waits for it.",
            ("{{replica}}", by_replica(rate("log_lines_dropped_total"))),
            width=6, limits=[(1, YELLOW)], up_to=2,
        ),
        panel(
            "Restarts", "none",
            "In the last 5 minutes: processes that began anew in their place, as Prometheus saw it; and "
            "restarts of containers as Kubernetes counts them, those that never served included (needs kube-state-metrics).",
            ("seen by Prometheus", total(in_place)), ("counted by Kubernetes", total(restarts)),
            width=6, limits=[(1, RED)], custom={"drawStyle": "bars", "fillOpacity": 60}, decimals=0, up_to=2,
            overrides=[colour("seen by Prometheus", ORANGE), colour("counted by Kubernetes", RED)],
        ),
        panel(
            "Build versions", "none",
            "Replicas by version and revision: two at once is a roll-out under way.",
            ("{{version}} {{revision}}", builds), width=6, custom={**STEPS, **STACKED}, decimals=0,
        ),
    ]


def builds_annotation():
    """A mark where a version or revision appears that was not there in the minutes before: not where
    the only replica missed a scrape."""
    running = gauge("order_service_build_info")
    by_build = "count by (version, revision)"
    query = f"{by_build} ({running}) unless {by_build} (last_over_time({running}[5m] offset 1m))"
    return {
        "name": "Builds", "datasource": DATASOURCE, "enable": True, "hide": False, "iconColor": PURPLE,
        # Grafana 10 reads the first two; later ones the target.
        "expr": query, "step": "15s",
        "target": {"refId": "Builds", "expr": query, "interval": "15s"},
        "titleFormat": "New build", "textFormat": "{{version}} ({{revision}})", "tagKeys": "version",
    }


def dashboard():
    rows = [
        ("Is it scaling?", scaling()),
        ("The tutorial's three", tutorial()),
        ("Calls", calls()),
        ("Saturation", saturation()),
        ("Process", process()),
    ]
    return {
        "title": "Order service",
        # Its address stays, and an import overwrites what was imported before.
        "uid": "order-service",
        "description": "Orders, the replicas that KEDA runs for them, and how well they are served.",
        "tags": ["order-service"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [builds_annotation()]},
        "templating": {
            "list": [
                {
                    "type": "datasource", "name": "datasource", "label": "Data source",
                    "query": "prometheus", "refresh": 1, "regex": "", "hide": 0, "multi": False,
                    "includeAll": False, "options": [],
                    # Any Grafana has one so called; where it is not Prometheus, the first that is.
                    "current": {"selected": True, "text": "default", "value": "default"},
                },
                # Absent from the series of a local run: All must match the absent label too.
                selector("namespace", "Namespace", ".*"),
                selector("job", "Job", ".+", "namespace"),
                selector("pod", "Pod", ".*", "namespace", "job"),
                selector("instance", "Instance", ".+", "namespace", "job", "pod"),
                {
                    "type": "textbox", "name": "threshold", "label": "Orders per replica in 5 min",
                    "query": "20", "hide": 0,
                    "current": {"selected": True, "text": "20", "value": "20"},
                    "options": [{"selected": True, "text": "20", "value": "20"}],
                },
            ]
        },
        "panels": laid_out(rows),
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2, ensure_ascii=False))
