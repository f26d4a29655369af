#!/usr/bin/env bash
# Installs what is missing, builds, and runs the tests:
#   lint     formats, linters, clang-tidy over server/ and client/   build/release
#   release  all of ctest, optimized                             build/release
#   asan     all of ctest, Address- and UndefinedBehaviorSanitizer  build/asan
#   fuzz     libFuzzer targets, a bounded number of inputs       build/asan
#   tsan     what links no gRPC, under ThreadSanitizer           build/tsan
#   e2e      the two programs from outside, and the include dependencies
#   python   the Python client against a server
#   models   models of torch through the Python client; the first time a download of 3.3 GB
#   deploy   the chart, the rules and dashboards, with the tools they are for
#
#   bash tests/run.sh [STAGE...]       each of them unless named
#   bash tests/run.sh all [STAGE...]   with what is long or large, too: clang-tidy over tests/, the
#                                      benchmarks' build, AddressSanitizer on searches of every scale,
#                                      longer fuzzing, 100 kills, slow models, the image
#
# `all` started again on the same commit runs only the stages that have not passed. A stage that
# fails does not keep the others from running. The last line is the sum over all of them; the exit
# status is 0 only if nothing failed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
jobs="$(nproc)"

full=false
if [[ "${1:-}" == all ]]; then
  full=true
  shift
fi
if [[ $# -eq 0 ]]; then
  set -- lint release asan fuzz tsan e2e python models deploy
fi
for name in "$@"; do
  if [[ ! "$name" =~ ^(lint|release|asan|fuzz|tsan|e2e|python|deploy|models)$ ]]; then
    echo "run.sh: no stage '$name'; there are lint, release, asan, fuzz, tsan, e2e, python, models, deploy;" \
      "before them 'all' for what is long" >&2
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

# A folder a stage: what it reported, and the file `passed` once all of that was well. What `all`
# found out about a commit is kept; of sources that no commit names, nothing is.
results=build/results/latest
resume=false
if $full; then
  results=build/results/all-uncommitted
  if commit="$(git rev-parse HEAD 2>/dev/null)" && [[ -z "$(git status --porcelain)" ]]; then
    results="build/results/all-$commit"
    resume=true
  fi
fi
results="$root/$results"
$resume || rm -rf "$results"
# The stage that runs: its folder, and the lines for tests/count_results.py.
reports=""
stages=""

# record NAME STATUS JUNIT-FILE|- [FOLDER-OF-GTEST-FILES]
record() {
  printf '%s\t%d\t%s\t%s\n' "$1" "$2" "$3" "${4:--}" >>"$stages"
}

heading() {
  printf '\n=== %s (%dm%02ds)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60))
}

# configure TREE CMAKE-OPTION...
configure() {
  local tree="build/$1" log="$reports/cmake-$1.log"
  shift
  cmake -S . -B "$tree" -G Ninja "$@" >"$log" 2>&1 || { cat "$log"; return 1; }
}

# make_targets TREE "TARGET..." CMAKE-OPTION...
make_targets() {
  local tree="$1" targets="$2"
  shift 2
  # Word splitting is meant: a list of targets.
  # shellcheck disable=SC2086
  configure "$tree" "$@" &&
    cmake --build "build/$tree" --parallel "$jobs" --target $targets -- -k 0
}

# build TREE "TARGET..." CMAKE-OPTION...
# Counts as a failed test if it fails, and as none if it does not.
declare -A one_by_one
build() {
  local tree="$1" status=0
  if [[ -z "${one_by_one[$tree]:-}" ]]; then
    make_targets "$@" || status=$?
  fi
  # Sources of one batch may define the same name, which is no defect.
  if [[ $status -ne 0 && "$*" == *-DCMAKE_UNITY_BUILD=ON* ]]; then
    echo "run.sh: $tree: a batch of sources does not compile; each is compiled on its own, which takes longer"
    one_by_one[$tree]=yes
  fi
  if [[ -n "${one_by_one[$tree]:-}" ]]; then
    status=0
    make_targets "$@" -DCMAKE_UNITY_BUILD=OFF || status=$?
  fi
  if [[ $status -ne 0 ]]; then
    record "$tree: build" "$status" -
  fi
  return "$status"
}

# run_ctest NAME CTEST-OPTION...
run_ctest() {
  local name="$1" status=0
  shift
  rm -rf "build/$name/gtest"
  ctest --test-dir "build/$name" --output-on-failure --no-tests=error --parallel "$jobs" \
    --timeout 900 --output-junit "$reports/$name.xml" "$@" || status=$?
  if [[ -d "build/$name/gtest" ]]; then
    cp -r "build/$name/gtest" "$reports/gtest"
  fi
  record "$name: ctest" "$status" "$reports/$name.xml" "$reports/gtest"
}

release_options=(-DCMAKE_BUILD_TYPE=Release -DCMAKE_UNITY_BUILD=OFF -DCERTIQ_TESTS=ON
  "-DCERTIQ_BENCHMARKS=$($full && echo ON || echo OFF)" -DCERTIQ_ENGINE_VARIANTS=)

# Sanitized code is compiled for a quick build more than for a quick run: with clang, which takes two
# thirds of gcc's time for it, and eight sources at a time, which takes a third of the time of one by
# one. Asserts stay on. That each source includes what it needs, build/release checks.
sanitizer_flags=(
  -DCMAKE_CXX_COMPILER=clang++-14
  -DCMAKE_BUILD_TYPE=RelWithDebInfo
  "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -D_GLIBCXX_ASSERTIONS"
  -DCMAKE_UNITY_BUILD=ON
  -DCMAKE_UNITY_BUILD_BATCH_SIZE=8
  -DCERTIQ_BENCHMARKS=OFF
)

# Comparisons with every scale there is, on one thread, take minutes under a sanitizer. Release runs
# them as they are, and `all` runs them under AddressSanitizer.
brute_force='DynamicScalesTest.*:PisoLayerTest.*:PisoSearchTest.*:ScaleSearchTest.*'

# build_asan TARGETS: one tree for the tests and the fuzzers.
build_asan() {
  build asan "$1" "${sanitizer_flags[@]}" -DCERTIQ_FUZZ=ON \
    -DCERTIQ_SANITIZE=address,undefined,fuzzer-no-link
}

stage_lint() {
  local options=()
  if $full; then options+=(--all); fi
  # Its checks record themselves.
  bash tests/lint.sh "${options[@]}" "$stages" || true
}

stage_release() {
  if build release all "${release_options[@]}"; then
    run_ctest release
  fi
}

stage_asan() {
  if build_asan all; then
    if $full; then
      run_ctest asan
    else
      GTEST_FILTER="-$brute_force" run_ctest asan
    fi
  fi
}

# fuzz_one SOURCE: output goes to build/fuzz/NAME.log, the status to NAME.status.
fuzz_one() {
  local name runs=200000 seconds=45 status=0
  name="$(basename "$1" .cc)"
  local folders=("build/fuzz/corpus/$name")
  if $full; then
    runs=2000000 seconds=300
  fi
  mkdir -p "${folders[0]}" build/fuzz/artifacts
  if [[ -d "tests/fuzz/corpus/$name" ]]; then
    folders+=("tests/fuzz/corpus/$name")
  fi
  "build/asan/bin/$name" -seed=1 "-runs=$runs" "-max_total_time=$seconds" -timeout=20 \
    -rss_limit_mb=2048 -artifact_prefix=build/fuzz/artifacts/ "${folders[@]}" \
    >"build/fuzz/$name.log" 2>&1 || status=$?
  echo "$status" >"build/fuzz/$name.status"
}

stage_fuzz() {
  local source name status running=0
  if ! build_asan fuzz_targets; then
    return
  fi
  rm -f build/fuzz/*.status
  for source in tests/fuzz/*_fuzz.cc; do
    if [[ $running -ge $jobs ]]; then
      wait -n
      running=$((running - 1))
    fi
    fuzz_one "$source" &
    running=$((running + 1))
  done
  wait
  for source in tests/fuzz/*_fuzz.cc; do
    name="$(basename "$source" .cc)"
    status="$(cat "build/fuzz/$name.status" || echo 1)"
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
  if build tsan "engine_tests runtime_tests store_tests calibration_tests job_tests" \
    "${sanitizer_flags[@]}" -DCERTIQ_SANITIZE=thread; then
    # Comparisons with every scale run on one thread and show nothing here.
    GTEST_FILTER="-$brute_force" run_ctest tsan \
      --label-regex '^(engine|runtime|store|calibration|job)$'
  fi
}

# run_pytest NAME PYTHON PATH...
run_pytest() {
  local name="$1" interpreter="$2" status=0
  shift 2
  "$interpreter" -m pytest -p no:cacheprovider --quiet --color=no -ra --durations=15 \
    --junitxml="$reports/$name.xml" "$@" || status=$?
  record "$name: pytest" "$status" "$reports/$name.xml"
}

# A stage that waits for servers more than it computes has its packages and programs made by
# prepare_NAME, so that two such stages can run at a time.

# prepare NAME COMMAND...
# Builds the programs, then runs the command, which installs what the stage's tests import.
prepare() {
  local name="$1"
  shift
  if ! build release "certiq-server certiq" "${release_options[@]}"; then
    return 1
  fi
  if ! "$@"; then
    record "$name: packages" 1 -
    return 1
  fi
}

prepare_e2e() { prepare e2e bash tests/python_package.sh; }

stage_e2e() {
  local kills=20
  if $full; then kills=100; fi
  CERTIQ_FAULT_KILLS="${CERTIQ_FAULT_KILLS:-$kills}" run_pytest e2e "$python" \
    tests/count_results_test.py tests/dependencies_test.py tests/bench/bench_scripts_test.py tests/e2e
}

prepare_python() { prepare python bash tests/python_package.sh; }

stage_python() {
  run_pytest python build/venv-python/bin/python tests/client/python
}

prepare_models() { prepare models bash tests/torch_packages.sh; }

stage_models() {
  local select=(-m "not slow")
  if $full; then select=(); fi
  run_pytest models build/venv-torch/bin/python "${select[@]}" tests/client/models
}

deploy_packages() {
  bash deploy/install_packages.sh deploy &&
    bash tests/venv.sh build/venv-deploy tests/requirements.txt tests/deploy/requirements.txt
}

prepare_deploy() { prepare deploy deploy_packages; }

# What cannot be had here (a tool's cache, a right) skips its tests, and says so.
stage_deploy() {
  local select=(--ignore=tests/deploy/test_image.py)
  if $full; then select=(); fi
  run_pytest deploy build/venv-deploy/bin/python "${select[@]}" tests/deploy
}

# enter NAME: from here on, what is recorded belongs to that stage.
enter() {
  reports="$results/$1"
  stages="$reports/stages.tsv"
}

# begin NAME: fails if the stage passed before.
begin() {
  enter "$1"
  if [[ -f "$reports/passed" ]]; then
    return 1
  fi
  rm -rf "$reports"
  mkdir -p "$reports"
  : >"$stages"
}

# run_stage NAME: of a stage that has begun.
run_stage() {
  enter "$1"
  heading "$1"
  "stage_$1"
  if "$python" tests/count_results.py "$reports" >"$reports/sum"; then
    touch "$reports/passed"
  fi
}

run_stages() {
  local name
  for name in "$@"; do
    run_stage "$name"
  done
}

folders=()
# The Python client's stages install into client/python, so that they never run at the same time.
first=()
second=()
for name in "$@"; do
  folders+=("$results/$name")
  if ! begin "$name"; then
    heading "$name"
    echo "passed before, on this commit"
  elif [[ ! "$name" =~ ^(e2e|deploy|python|models)$ ]]; then
    run_stage "$name"
  elif heading "$name: programs and packages" && "prepare_$name"; then
    if [[ "$name" =~ ^(python|models)$ ]]; then
      second+=("$name")
    else
      first+=("$name")
    fi
  fi
done

if $full; then
  run_stages "${first[@]}" "${second[@]}"
else
  run_stages "${second[@]}" >"$results/second.log" 2>&1 &
  run_stages "${first[@]}"
  wait
  cat "$results/second.log"
fi

heading "sum"
exec "$python" tests/count_results.py "${folders[@]}"
