#!/usr/bin/env bash
# Copies rules/*.yml to the end of values.yaml, where the chart takes them from.
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
