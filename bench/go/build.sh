#!/usr/bin/env bash
# Builds the Go peers into DIRECTORY. Needs Go 1.26 or newer and protoc (Debian: protobuf-compiler).
# Usage: build.sh DIRECTORY
set -euo pipefail
to=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")"
GOBIN="$to" go install google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
PATH="$to:$PATH" protoc -I ../../proto --go_out=. --go-grpc_out=. \
  --go_opt=module=order-service-peers --go-grpc_opt=module=order-service-peers \
  --go_opt=Morders/v1/orders.proto=order-service-peers/orders --go-grpc_opt=Morders/v1/orders.proto=order-service-peers/orders \
  orders/v1/orders.proto
go build -o "$to" ./grpc-server ./http-server
