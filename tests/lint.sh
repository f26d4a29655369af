#!/usr/bin/env bash
# Checks that read sources without running them. Ends with how many passed;
# exit status 1 if one failed.
#
#   bash tests/lint.sh [--all] [FILE]
#
# clang-tidy reads server/ and client/, and with --all tests/ as well. A line for
# each check is appended to FILE, as tests/count_results.py reads them.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
tidied=(server client)
if [[ "${1:-}" == --all ]]; then
  tidied+=(tests)
  shift
fi
stages="${1:-/dev/null}"
if [[ $# -gt 1 || "$stages" == -* ]]; then
  echo "lint.sh: expected --all or nothing, then one file name or none, got '$*'" >&2
  exit 2
fi
bin=build/venv/bin
build=build/release

bash tests/venv.sh

# clang-tidy needs the compile commands and the generated headers.
prepare_build() {
  if [[ ! -f "$build/build.ninja" ]] ||
    ! grep -qx 'CERTIQ_TESTS:BOOL=ON' "$build/CMakeCache.txt"; then
    cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DCERTIQ_TESTS=ON -DCERTIQ_BENCHMARKS=ON
  fi
  cmake --build "$build" --parallel "$(nproc)" --target certiq_proto
}

clang_format() {
  find server client tests \( -name '*.h' -o -name '*.cc' \) -print0 |
    xargs -0 --no-run-if-empty -n 16 -P "$(nproc)" clang-format-14 --dry-run -Werror
}

clang_tidy() {
  prepare_build
  "$bin/python" tests/clang_tidy.py "$build" "${tidied[@]}"
}

buf_lint() { (cd proto && "../$bin/buf" lint); }
buf_format() { (cd proto && "../$bin/buf" format --diff --exit-code); }

python_files() { find tests client deploy -name '*.py' -not -path '*/.*' -not -name '*_pb2*' -print0; }
ruff_check() { python_files | xargs -0 "$bin/ruff" check --quiet; }
mypy_check() {
  bash tests/python_package.sh
  (cd client/python && ../../build/venv-python/bin/mypy --no-incremental)
}
ruff_format() { python_files | xargs -0 "$bin/ruff" format --check --quiet --diff; }

shell_check() {
  local scripts
  mapfile -t scripts < <(find deploy tests -name '*.sh')
  "$bin/shellcheck" .ci/run "${scripts[@]}"
}

passed=0
failed=0
check() {
  local name="$1" status=0
  shift
  # A subshell with -e of its own, so that "if" does not switch it off inside.
  set +e
  (set -e; "$@") 2>&1
  status=$?
  set -e
  printf 'lint: %s\t%d\t-\n' "$name" "$status" >>"$stages"
  if [[ $status -eq 0 ]]; then
    passed=$((passed + 1))
    echo "lint: ok      $name"
  else
    failed=$((failed + 1))
    echo "lint: FAILED  $name"
  fi
}

check "buf lint" buf_lint
check "buf format" buf_format
check "clang-format" clang_format
check "ruff check" ruff_check
check "ruff format" ruff_format
check "mypy" mypy_check
check "shellcheck" shell_check
check "clang-tidy" clang_tidy

echo "lint: $passed passed, $failed failed"
[[ $failed -eq 0 ]]
