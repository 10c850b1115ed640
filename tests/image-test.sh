#!/usr/bin/env bash
# Builds the real Dockerfile where there is no container engine and no registry, and runs what came out.
#
# buildah builds in a chroot, on stand-ins for the two base images: Debian's C compiler by debootstrap, with this
# machine's Rust toolchain mounted; and the packages of the distroless image, unpacked, with no shell. What that cannot
# prove is how the real bases behave, and arm64.
#
# Needs root (or sudo) on Debian, and 10 GB for target/image-test: buildah's vfs copies every layer, and what a
# layer does not hold is not copied. The toolchain and the crates are therefore mounted, and intermediate images
# removed once they have proved what they are for. Usage: tests/image-test.sh, from anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."

[ "$(id -u)" = 0 ] || exec sudo --preserve-env=PATH,HOME,CARGO_HOME,RUSTUP_HOME "$0" "$@"
missing=()
for tool in buildah debootstrap curl jq; do command -v $tool >/dev/null || missing+=($tool); done
if [ ${#missing[@]} -gt 0 ]; then
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"
fi

MOST_BYTES=$((16 * 1000 * 1000)) # of the image without its base
work=$PWD/target/image-test
mkdir -p "$work"
buildah() { command buildah --storage-driver vfs --root "$work/store" --runroot "$work/run" "$@"; }
fail() { echo "image-test: $*" >&2; exit 1; }
check() { [ "$2" = "$3" ] || fail "$1: \"$2\", expected \"$3\""; }

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
revision=$(git rev-parse HEAD)
build_base=$(sed -n 's/^FROM \(.*\) AS build$/\1/p' Dockerfile)
run_base=$(sed -n 's/^FROM \([^ ]*\)$/\1/p' Dockerfile)

# --- The stand-ins -------------------------------------------------------------------------------

there() { buildah inspect --type image "$1" >/dev/null 2>&1; }
sysroot=$(rustc --print sysroot)
if ! there "$build_base" || ! there "$run_base"; then
  debian=$work/debian
  rm -rf "$debian"
  debootstrap --variant=minbase --include=gcc,libc6-dev,ca-certificates bookworm "$debian" >"$work/debootstrap.log"

  root=$work/distroless
  rm -rf "$root"
  mkdir -p "$root"
  for package in base-files netbase tzdata libc6 libgcc-s1 libstdc++6 libgomp1 libssl3; do
    for deb in "$debian"/var/cache/apt/archives/"$package"_*.deb; do
      if [ -e "$deb" ]; then dpkg -x "$deb" "$root"; fi
    done
  done
  mkdir -p "$root/etc/ssl/certs" "$root/home/nonroot" "$root/tmp"
  chown 65532:65532 "$root/home/nonroot"
  chmod 1777 "$root/tmp"
  cp "$debian/etc/ssl/certs/ca-certificates.crt" "$root/etc/ssl/certs/"
  printf 'root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n' >"$root/etc/passwd"
  printf 'root:x:0:\nnonroot:x:65532:\n' >"$root/etc/group"
  container=$(buildah from scratch)
  buildah add -q "$container" "$root" / >/dev/null
  buildah config --user 65532 --workingdir /home/nonroot \
    --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt "$container"
  buildah commit -q --rm "$container" "$run_base" >/dev/null

  rm -rf "$debian"/var/cache/apt/archives/*.deb "$debian"/var/lib/apt/lists/* "$debian"/usr/share/{doc,man,locale,info}
  mkdir -p "$debian/usr/local/rust"
  container=$(buildah from scratch)
  buildah add -q "$container" "$debian" / >/dev/null
  buildah config --env CARGO_HOME=/usr/local/cargo \
    --env PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah commit -q --rm "$container" "$build_base" >/dev/null
  rm -rf "$debian" "$root"
fi

# --- The build -----------------------------------------------------------------------------------

# How cargo reaches the crates is this machine's affair: its certificates and its cargo settings, if it has
# any, are mounted. The registry's cache is this test's own.
mkdir -p "$work/registry"
mounts=(--volume "$sysroot:/usr/local/rust:ro" --volume "$work/registry:/usr/local/cargo/registry"
  --volume /etc/ssl/certs:/etc/ssl/certs:ro)
for settings in "${CARGO_HOME:-$HOME/.cargo}"/config{,.toml}; do
  if [ -e "$settings" ]; then mounts+=(--volume "$settings:/usr/local/cargo/${settings##*/}:ro"); fi
done
build() {
  buildah build --isolation chroot --layers --force-rm --pull-never "${mounts[@]}" \
    --build-arg "ORDER_SERVICE_VERSION=$version" --build-arg "ORDER_SERVICE_REVISION=$revision" "$@"
}
build -t order-service:test . 2>&1 | tee "$work/build.log"

# A change of a source leaves the layer of the dependencies alone. This one does not compile, so the
# rebuild ends early.
changed=$work/changed
rm -rf "$changed"
mkdir "$changed"
cp -rp Dockerfile .dockerignore Cargo.toml Cargo.lock build.rs proto migrations src "$changed"
echo 'compile_error!("changed");' >>"$changed/src/lib.rs"
if build -t order-service:changed "$changed" >"$work/changed.log" 2>&1; then fail "the changed source was not compiled"; fi
grep -q 'error: changed' "$work/changed.log" || fail "see $work/changed.log"
! grep -q 'Compiling tokio ' "$work/changed.log" || fail "a changed source compiles the dependencies again"
buildah rmi --prune --force >/dev/null # the layers of the build stage, which have served

# --- What it says of itself ----------------------------------------------------------------------

config=$(buildah inspect --type image order-service:test | jq .OCIv1.config)
of() { jq -r "$1" <<<"$config"; }
check User "$(of .User)" 65532:65532
check WorkingDir "$(of .WorkingDir)" /data
check Volumes "$(of '.Volumes | keys | join(" ")')" /data
check Entrypoint "$(of '.Entrypoint | join(" ")')" /usr/local/bin/order-service
check ExposedPorts "$(of '.ExposedPorts | keys | join(" ")')" "8181/tcp 9464/tcp"
check version "$(of '.Labels["org.opencontainers.image.version"]')" "$version"
check revision "$(of '.Labels["org.opencontainers.image.revision"]')" "$revision"
for setting in ORDER_LISTEN=0.0.0.0:8181 ORDER_ADMIN_LISTEN=0.0.0.0:9464 ORDER_LOG_FORMAT=json ORDER_DRAIN_DELAY=5s ORDER_FINAL_SCRAPE_TIMEOUT=15s; do
  of '.Env[]' | grep -qx "$setting" || fail "Env has no $setting"
done

layers=$work/layers
rm -rf "$layers"
buildah push -q --disable-compression order-service:test "dir:$layers"
base=$(buildah inspect --type image "$run_base" | jq '.OCIv1.rootfs.diff_ids | length')
bytes=$(jq "[.layers[$base:][].size] | add" "$layers/manifest.json")
echo "image without its base: $bytes bytes"
[ "$bytes" -le "$MOST_BYTES" ] || fail "image without its base: $bytes bytes, expected at most $MOST_BYTES"

# --- What it does --------------------------------------------------------------------------------

container=$(buildah from --pull-never order-service:test)
log=$work/service.log
# The image's user, directory and settings, but ports of its own on loopback.
buildah run --isolation chroot --env ORDER_LISTEN=127.0.0.1:0 --env ORDER_ADMIN_LISTEN=127.0.0.1:0 \
  "$container" -- /usr/local/bin/order-service >"$log" 2>&1 &
runner=$!
pid=
load=
end() {
  [ -z "$pid" ] || kill -9 "$pid" 2>/dev/null || true
  wait $runner 2>/dev/null || true
  buildah rm "$container" ${load:+"$load"} >/dev/null
}
trap end EXIT
for _ in $(seq 300); do
  if grep -q '"serving"' "$log" || ! kill -0 $runner 2>/dev/null; then break; fi
  sleep 0.1 # the service has no other way to say that it listens than its log
done
line=$(grep '"serving"' "$log") || fail "the service did not start: $(cat "$log")"
at() { jq -r ".fields.$1 // .$1" <<<"$line"; }
api=$(at api)
admin=$(at admin)

answer=$(curl -sS -D "$work/headers" "http://$api/product")
check "GET /product" "$answer" "Order placed!"
pid=$(sed -n 's/^x-served-by: .*:\([0-9]*\)\r$/\1/p' "$work/headers")
check "the user of the process" "$(awk '/^Uid:/ { print $2 }' "/proc/$pid/status")" 65532
check "its directory" "$(readlink "/proc/$pid/cwd" | sed 's|.*\(/data\)$|\1|')" /data
rooted=/proc/$pid/root
[ -s "$rooted/data/orders.db" ] || fail "no orders.db in /data"
check "the owner of orders.db" "$(stat -c %u "$rooted/data/orders.db")" 65532
[ ! -e "$rooted/bin/sh" ] || fail "the image has a shell"
page=$(curl -sS "http://$admin/metrics")
grep -qx 'product_order_total 1' <<<"$page" || fail "the order was not counted"
grep -q "order_service_build_info{revision=\"$revision\",version=\"$version\"} 1" <<<"$page" || fail "build info"

# The load test of the same image, in a container of its own.
load=$(buildah from --pull-never order-service:test)
buildah run --isolation chroot "$load" -- /usr/local/bin/order-load --target "http://$api" --phases 1s@20 --audit \
  || fail "order-load"

# It drains, waits for its last scrape and ends.
kill -TERM "$pid"
for _ in $(seq 600); do
  if ! kill -0 "$pid" 2>/dev/null; then break; fi
  curl -s -o "$work/last" "http://$admin/metrics" || true
  sleep 0.1 # as a scraper would
done
code=0
wait $runner || code=$?
check "the exit code after SIGTERM" "$code" 0
pid=
echo "image-test: all well"
