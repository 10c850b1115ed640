# The image of order-service and order-load.
#
#   docker build -t order-service:0.1.0 .
#
# For other processors, and several at once, buildx builds the same file natively or under emulation:
#
#   docker buildx build --platform linux/amd64,linux/arm64 -t registry.example.com/order-service:0.1.0 --push .
#
# Both bases exist for amd64 and arm64, and nothing below names a processor. arm64 is untried.

# Tags can move: a registry of your own may pin both bases by digest.
#
# At least Cargo.toml's `rust-version`, and on the same Debian as the runtime: it sets the oldest glibc.
FROM docker.io/library/rust:1.95.0-slim-bookworm AS build
WORKDIR /build

# The dependencies, in a layer that only the manifest, the lock file and this file invalidate: empty
# sources stand in for ours.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src/bin/order-load benches \
    && for bench in $(sed -n '/^\[\[bench\]\]/,/^name/s/^name = "\(.*\)"/\1/p' Cargo.toml); do \
         echo 'fn main() {}' > "benches/$bench.rs"; \
       done \
    && echo 'fn main() {}' | tee build.rs src/main.rs src/bin/order-load/main.rs > /dev/null \
    && touch src/lib.rs \
    && cargo build --release --locked --bins \
    && rm -r build.rs src

# No more than .dockerignore lets through.
COPY . .
# What `order_service_build_info` and the image's label tell. Not before here, since it changes with each commit.
ARG ORDER_SERVICE_REVISION=unknown
# Copied files keep their times, which may be older than the stand-ins': cargo would take those for
# up to date.
RUN find build.rs proto migrations src -exec touch {} + \
    && cargo build --release --locked --bins \
    && mkdir -p /out/data \
    && cp target/release/order-service target/release/order-load /out/

# No shell, no package manager; the C library, CA certificates and the user `nonroot`, 65532.
FROM gcr.io/distroless/cc-debian13:nonroot
ARG ORDER_SERVICE_VERSION=0.1.0
ARG ORDER_SERVICE_REVISION=unknown
LABEL org.opencontainers.image.title="order-service" \
      org.opencontainers.image.description="A durable gRPC and REST order service that scales on its own business metric" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${ORDER_SERVICE_VERSION}" \
      org.opencontainers.image.revision="${ORDER_SERVICE_REVISION}"

COPY --from=build /out/order-service /out/order-load /usr/local/bin/
# The embedded database's default, `orders.db`, lands in /data.
COPY --from=build --chown=65532:65532 /out/data /data
WORKDIR /data
VOLUME /data

# A container's loopback is nobody else's. A balancer needs some time to see that a replica ends; and
# Prometheus some for the last scrape, which must exceed its interval.
ENV ORDER_LISTEN=0.0.0.0:8181 \
    ORDER_ADMIN_LISTEN=0.0.0.0:9464 \
    ORDER_LOG_FORMAT=json \
    ORDER_DRAIN_DELAY=5s \
    ORDER_FINAL_SCRAPE_TIMEOUT=15s
EXPOSE 8181 9464
# By number: Kubernetes cannot tell that a name is not root.
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/order-service"]
