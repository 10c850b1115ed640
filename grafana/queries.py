"""The pieces of PromQL that the dashboard's queries are made of.

A query must work on Kubernetes, where series carry `namespace` and `pod`, and against a local process,
where they do not: the variables match absent labels too, and a replica is called by its pod's name or,
failing that, by its address.
"""

# What the four selectors at the top of the dashboard choose.
CHOSEN = 'namespace=~"$namespace", job=~"$job", pod=~"$pod", instance=~"$instance"'
# All replicas, whichever of them are chosen: what the autoscaler looks at, and what a share is of.
WHOLE = 'namespace=~"$namespace", job=~"$job"'

# Objects of Kubernetes, as kube-state-metrics and KEDA name them. Their series come from other jobs.
DEPLOYMENT = 'namespace=~"$namespace", deployment="order-service"'
HPA = 'namespace=~"$namespace", horizontalpodautoscaler="keda-hpa-order-service"'
# Pods of the Deployment: its name, the ReplicaSet's hash, the pod's own five characters.
PODS = 'namespace=~"$namespace", pod=~"$pod", pod=~"order-service-[a-z0-9]{6,10}-[a-z0-9]{5}"'
# The first trigger of the ScaledObject is the one on orders; HPA knows it as s0-…. Prometheus renames
# the label to exported_namespace unless told to honour it.
KEDA = 'scaledObject="order-service", metric=~"s0-.+"'

# Codes that blame the service: what a caller may retry or report. All others but OK blame the caller.
# `Internal` blames the service unless the request was malformed, see `internal_faults`.
GRPC_FAULTS = "Unknown|ResourceExhausted|Unavailable|DataLoss"

# The new orders of the last five minutes, those of replicas younger than that included, as an integer:
# see docs/scaling.md.
EXACT = f"""\
sum(
  (
    last_over_time(product_order_total{{{WHOLE}}}[5m]) + max_over_time(product_order_total{{{WHOLE}}}[315s]) * resets(product_order_total{{{WHOLE}}}[315s])
    - (last_over_time(product_order_total{{{WHOLE}}}[15s] offset 5m) or 0 * (min_over_time(process_start_time_seconds{{{WHOLE}}}[5m]) > time() - 315))
    and resets(product_order_total{{{WHOLE}}}[315s]) == (last_over_time(product_order_total{{{WHOLE}}}[5m]) < bool max_over_time(product_order_total{{{WHOLE}}}[315s]))
    unless resets(product_order_total{{{WHOLE}}}[15s] offset 5m) > 0
  )
  or increase(product_order_total{{{WHOLE}}}[5m])
)"""


def of_this_service(vector, which=CHOSEN):
    """Those series of a vector whose target runs this service: `up` and `process_*` are in every job."""
    return f"({vector} and on (job, instance) last_over_time(order_service_build_info{{{which}}}[5m]))"


def targets(which=CHOSEN):
    """1 for each replica that answers Prometheus, 0 for each that does not any more."""
    return of_this_service(f"up{{{which}}}", which)


READY = f"sum(kube_deployment_status_replicas_ready{{{DEPLOYMENT}}}) or sum({targets(WHOLE)})"


def rate(metric, *matchers, which=CHOSEN):
    """Per second, of each series."""
    return f"rate({metric}{{{', '.join((*matchers, which))}}}[$__rate_interval])"


def internal_faults():
    """gRPC calls that ended as INTERNAL, without the malformed ones: as in prometheus/rules."""
    codes = 'grpc_code=~"Internal|Unimplemented|DeadlineExceeded"', 'grpc_method!="other"'
    internal = rate("grpc_server_handled_total", *codes)
    malformed = rate("requests_malformed_total", 'protocol="grpc"')
    return f"sum(clamp_min(sum by (namespace) ({internal} or -{malformed}), 0))"


def gauge(metric):
    """The chosen series of a gauge."""
    return f"{metric}{{{CHOSEN}}}"


def total(vector, by=""):
    """The sum of a vector, by these labels."""
    return f"sum by ({by}) ({vector})" if by else f"sum({vector})"


def replica(vector):
    """The vector with a label `replica`: the end of the pod's name, by which the pods of a Deployment
    differ, or the whole name or, without one, the address."""
    by_address = f'label_replace({vector}, "replica", "$1", "instance", "(.+)")'
    return f'label_replace({by_address}, "replica", "$1", "pod", "(?:.+-)?(.+)")'


def by_replica(vector, function="sum"):
    """One value for each replica."""
    return f"{function} by (replica) ({replica(vector)})"


def ratio(part, whole):
    """A part of a whole; nothing, rather than a division by zero, while the whole is idle."""
    return f"{part}\n/\n({whole} > 0)"


def quantile(q, buckets, by=""):
    """A quantile of a histogram's rates; nothing where nothing was observed."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) ({buckets})) >= 0"
