#!/usr/bin/env bash
# Copies rules/*.yml to the end of values.yaml, where the chart takes them from, and into the PrometheusRule that the
# Prometheus Operator takes.
set -euo pipefail
cd "$(dirname "$0")"

head=$(sed '/^# below this line\.$/q' values.yaml)
embedded() { echo "  $1:"; grep -v '^#' "$2" | sed 's/^\(.\)/    \1/'; }
{
  echo "$head"
  echo "serverFiles:"
  embedded recording_rules.yml rules/recording.yml
  embedded alerting_rules.yml rules/alerts.yml
} >values.yaml.new
mv values.yaml.new values.yaml

groups() { sed '1,/^groups:$/d' "$1" | sed 's/^\(.\)/  \1/'; }
{
  cat <<'END'
# The rules of prometheus/rules for the Prometheus Operator. `prometheus/embed-rules.sh` makes this file; do not edit it.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: order-service
  namespace: orders
  labels:
    app.kubernetes.io/name: order-service
spec:
  groups:
END
  groups rules/recording.yml
  groups rules/alerts.yml
} >../k8s/components/prometheusrule/prometheusrule.yaml
