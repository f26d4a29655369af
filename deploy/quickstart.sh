#!/usr/bin/env bash
# From a clone to a certificate: installs what is missing, builds, starts a
# server on a free port of the loopback, quantizes the layer in tests/data to
# 4 bits, prints the certificate's summary and stops the server.
# Leaves build/release and, in build/quickstart, the quantized weights and the
# full report. A second run only rebuilds what changed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
build=build/release
results=build/quickstart

bash deploy/install_packages.sh build

echo "quickstart: building in $build (some minutes the first time)"
mkdir -p "$results"
build_log="$results/build.log"

# The best of the engine's instruction sets that this CPU has, as the loader sees it.
engine_variant() {
  local loader=/lib64/ld-linux-x86-64.so.2 march
  for march in x86-64-v4 x86-64-v3; do
    if "$loader" --help 2>/dev/null | grep -q "$march (supported"; then
      echo "$march"
      return
    fi
  done
  echo x86-64-v2
}

# build CMAKE-OPTION...
build() {
  if ! cmake -S . -B "$build" "$@" >"$build_log" 2>&1; then
    cat "$build_log" >&2
    echo "quickstart: cmake failed" >&2
    exit 1
  fi
  cmake --build "$build" --parallel "$(nproc)" --target certiq-server certiq
}

if [[ -f "$build/build.ninja" ]]; then
  # tests/run.sh shares this tree: what it configured stays.
  build
else
  # What this machine runs and nothing else, several sources at a time: half the compile time.
  # Sources that define the same name cannot be compiled that way; then each is on its own.
  options=(-G Ninja -DCMAKE_BUILD_TYPE=Release -DCERTIQ_TESTS=OFF -DCERTIQ_BENCHMARKS=OFF
    "-DCERTIQ_ENGINE_VARIANTS=$(engine_variant)")
  build "${options[@]}" -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=8 ||
    build "${options[@]}" -DCMAKE_UNITY_BUILD=OFF
fi

scratch="$(mktemp -d)"
server_pid=""

# Runs on every way out: the server is told to go, waited for, and its files removed.
clean_up() {
  local status=$?
  trap - EXIT INT TERM HUP
  if [[ -n "$server_pid" ]]; then
    kill -TERM "$server_pid" 2>/dev/null || true
    # A drain ends by itself; this only guards against one that does not.
    for _ in $(seq 200); do
      kill -0 "$server_pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$server_pid" 2>/dev/null || true
    wait "$server_pid" 2>/dev/null || true
  fi
  rm -rf "$scratch"
  exit "$status"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

"$build/bin/certiq-server" --listen 127.0.0.1:0 --metrics_listen 127.0.0.1:0 \
  --data_dir "" --port_file "$scratch/port" >"$scratch/server.log" 2>&1 &
server_pid=$!

port=""
for _ in $(seq 300); do
  if [[ -s "$scratch/port" ]]; then
    port="$(head -n 1 "$scratch/port")"
    break
  fi
  kill -0 "$server_pid" 2>/dev/null || break
  sleep 0.1
done
if [[ -z "$port" ]]; then
  cat "$scratch/server.log" >&2
  echo "quickstart: the server did not start" >&2
  exit 1
fi
echo "quickstart: certiq-server listens on 127.0.0.1:$port"
echo

if ! "$build/bin/certiq" quantize \
  --server "127.0.0.1:$port" \
  --weights tests/data/weights.safetensors \
  --weight encoder.layer.3.attention.output.dense.weight \
  --activations tests/data/activations.safetensors \
  --x layer.3.attn_out.x \
  --method optq --bits 4 --group_size 64 --compare_nearest=true \
  --output "$results/quantized.safetensors" \
  --report "$results/report.json"; then
  echo "quickstart: the server's last lines:" >&2
  tail -n 20 "$scratch/server.log" >&2
  exit 1
fi

echo
echo "quickstart: weights in $results/quantized.safetensors, certificate in $results/report.json"
