#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test there is:
#   lint     formats, linters, clang-tidy                        build/release
#   release  all of ctest, optimized                             build/release
#   asan     all of ctest, Address- and UndefinedBehaviorSanitizer  build/asan
#   fuzz     libFuzzer targets, a bounded number of inputs       build/asan
#   tsan     engine and jobs under ThreadSanitizer               build/tsan
#   e2e      the two programs from outside, and the include arrows
#   python   the Python client against a server
#   deploy   the image, the chart, the rules and dashboards, with the tools they are for
#   models   models of torch through the Python client; the first time a download of 3.3 GB
#
#   bash tests/run.sh [STAGE...]     all of them unless named
#
# A stage that fails does not keep the others from running. The last line is the
# sum over all of them; the exit status is 0 only if nothing failed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
jobs="$(nproc)"
results="$root/build/results"
stages="$results/stages.tsv"

if [[ $# -eq 0 ]]; then
  set -- lint release asan fuzz tsan e2e python models deploy
fi
for name in "$@"; do
  if [[ ! "$name" =~ ^(lint|release|asan|fuzz|tsan|e2e|python|deploy|models)$ ]]; then
    echo "run.sh: no stage '$name'; there are lint, release, asan, fuzz, tsan, e2e, python, deploy, models" >&2
    exit 2
  fi
done

if ! bash deploy/install_packages.sh build test || ! bash tests/venv.sh; then
  echo "0 passed, 1 failed"
  exit 1
fi
python=build/venv/bin/python

# Comparisons with stored references run where the data is and skip elsewhere.
if [[ -z "${CERTIQ_SHARED_DATA:-}" && -d "$root/../shared/data" ]]; then
  CERTIQ_SHARED_DATA="$(cd "$root/../shared/data" && pwd)"
  export CERTIQ_SHARED_DATA
fi
# A finding of a sanitizer ends the test that made it.
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_stack_use_after_return=1}"
export UBSAN_OPTIONS="${UBSAN_OPTIONS:-halt_on_error=1:print_stacktrace=1}"
export TSAN_OPTIONS="${TSAN_OPTIONS:-halt_on_error=1:second_deadlock_stack=1}"

# Objects that were compiled before, in whatever clone, are not compiled again.
export CMAKE_CXX_COMPILER_LAUNCHER=ccache CCACHE_BASEDIR="$root" CCACHE_NOHASHDIR=1
export CCACHE_MAXSIZE="${CCACHE_MAXSIZE:-10G}"

rm -rf "$results"
mkdir -p "$results"
: >"$stages"

# record NAME STATUS JUNIT-FILE|-
record() {
  printf '%s\t%d\t%s\n' "$1" "$2" "$3" >>"$stages"
}

heading() {
  printf '\n=== %s (%dm%02ds)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60))
}

# build TREE "TARGET..." CMAKE-OPTION...
# Counts as a failed test if it fails, and as none if it does not.
build() {
  local tree="build/$1" targets="$2" log="$results/cmake-$1.log" status=0
  local name="$1"
  shift 2
  # Word splitting is meant: a list of targets.
  # shellcheck disable=SC2086
  { cmake -S . -B "$tree" -G Ninja "$@" >"$log" 2>&1 || { cat "$log"; false; }; } &&
    cmake --build "$tree" --parallel "$jobs" --target $targets -- -k 0 || status=$?
  if [[ $status -ne 0 ]]; then
    record "$name: build" "$status" -
  fi
  return "$status"
}

# run_ctest NAME CTEST-OPTION...
run_ctest() {
  local name="$1" status=0
  shift
  ctest --test-dir "build/$name" --output-on-failure --no-tests=error --parallel "$jobs" \
    --timeout 900 --output-junit "$results/$name.xml" "$@" || status=$?
  record "$name: ctest" "$status" "$results/$name.xml"
}

# Sanitized code is compiled for a quick build more than for a quick run, and with clang, which
# takes two thirds of gcc's time for it; asserts stay on.
sanitizer_flags=(
  -DCMAKE_CXX_COMPILER=clang++-14
  -DCMAKE_BUILD_TYPE=RelWithDebInfo
  "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -D_GLIBCXX_ASSERTIONS"
  -DCERTIQ_BENCHMARKS=OFF
)

# build_asan TARGETS: one tree for the tests and the fuzzers.
build_asan() {
  build asan "$1" "${sanitizer_flags[@]}" -DCERTIQ_FUZZ=ON \
    -DCERTIQ_SANITIZE=address,undefined,fuzzer-no-link
}

stage_lint() {
  # Its checks record themselves.
  bash tests/lint.sh "$stages" || true
}

stage_release() {
  if build release all -DCMAKE_BUILD_TYPE=Release -DCERTIQ_TESTS=ON -DCERTIQ_BENCHMARKS=ON; then
    run_ctest release
  fi
}

stage_asan() {
  if build_asan all; then
    run_ctest asan
  fi
}

# fuzz_one NAME: output goes to build/fuzz/NAME.log.
fuzz_one() {
  local name="$1" folders=("build/fuzz/corpus/$1")
  mkdir -p "${folders[0]}" build/fuzz/artifacts
  if [[ -d "tests/fuzz/corpus/$name" ]]; then
    folders+=("tests/fuzz/corpus/$name")
  fi
  "build/asan/bin/$name" -seed=1 -runs=200000 -max_total_time=60 -timeout=20 \
    -rss_limit_mb=2048 -artifact_prefix=build/fuzz/artifacts/ "${folders[@]}" \
    >"build/fuzz/$name.log" 2>&1
}

stage_fuzz() {
  local source name status
  if ! build_asan fuzz_targets; then
    return
  fi
  for source in tests/fuzz/*_fuzz.cc; do
    if [[ ! -e "$source" ]]; then
      continue
    fi
    name="$(basename "$source" .cc)"
    status=0
    fuzz_one "$name" || status=$?
    record "fuzz: $name" "$status" -
    if [[ $status -eq 0 ]]; then
      echo "ok      $name: $(tail -n 1 "build/fuzz/$name.log")"
    else
      tail -n 60 "build/fuzz/$name.log"
      echo "FAILED  $name (status $status)"
    fi
  done
}

stage_tsan() {
  # Only what holds no prebuilt gRPC: ThreadSanitizer cannot see into that.
  if build tsan "engine_tests jobs_tests" "${sanitizer_flags[@]}" -DCERTIQ_SANITIZE=thread; then
    # Comparisons with every scale there is, on one thread, take minutes here and show nothing.
    run_ctest tsan --label-regex '^(engine|jobs)$' \
      --exclude-regex '^(DynamicScales|PisoLayer|PisoSearch|ScaleSearch)Test[.]'
  fi
}

# run_pytest NAME PYTHON PATH...
run_pytest() {
  local name="$1" interpreter="$2" status=0
  shift 2
  "$interpreter" -m pytest -p no:cacheprovider --quiet --color=no -ra --durations=15 \
    --junitxml="$results/$name.xml" "$@" || status=$?
  record "$name: pytest" "$status" "$results/$name.xml"
}

stage_e2e() {
  if build release "certiq-server certiq" -DCMAKE_BUILD_TYPE=Release; then
    run_pytest e2e "$python" tests/arrows_test.py tests/bench/bench_scripts_test.py tests/e2e
  fi
}

# python_client NAME SCRIPT VENV PATH...
# Tests of client/python with what SCRIPT installs into VENV, against the server as it is now.
python_client() {
  local name="$1" script="$2" venv="$3"
  shift 3
  if ! build release "certiq-server" -DCMAKE_BUILD_TYPE=Release; then
    return
  fi
  if ! bash "$script"; then
    record "$name: packages" 1 -
    return
  fi
  run_pytest "$name" "$venv/bin/python" "$@"
}

stage_python() {
  python_client python tests/python_package.sh build/venv-python tests/client/python
}

# What cannot be had here (a tool's cache, a right) skips its tests, and says so.
stage_deploy() {
  if ! bash deploy/install_packages.sh deploy ||
    ! bash tests/venv.sh build/venv-deploy tests/requirements.txt tests/deploy/requirements.txt; then
    record "deploy: install" 1 -
    return
  fi
  if ! build release "certiq-server certiq" -DCMAKE_BUILD_TYPE=Release; then
    return
  fi
  run_pytest deploy build/venv-deploy/bin/python tests/deploy
}

stage_models() {
  python_client models tests/torch_packages.sh build/venv-torch tests/client/models
}

for name in "$@"; do
  heading "$name"
  "stage_$name"
done

heading "sum"
exec "$python" tests/count_results.py "$results"
