#!/usr/bin/env bash
# A walk through the API with grpcurl and nothing else: what a server offers, a calibration, a job,
# its result, one layer in one call. The layer is that of tests/data.
#
#   bash deploy/walk.sh [HOST:PORT]     default 127.0.0.1:8470
#
# GRPCURL_FLAGS, default -plaintext, is for TLS: GRPCURL_FLAGS="-cacert ca.pem". CERTIQ_TOKEN is sent
# where it is set.
set -euo pipefail

server="${1:-127.0.0.1:8470}"
data="$(cd "$(dirname "${BASH_SOURCE[0]}")/../tests/data" && pwd)"
read -r -a flags <<<"${GRPCURL_FLAGS:--plaintext}"
if [[ -n "${CERTIQ_TOKEN:-}" ]]; then
  # By its name, so that the token is in no list of processes.
  export CERTIQ_TOKEN
  # shellcheck disable=SC2016  # grpcurl expands it
  flags+=(-expand-headers -H 'authorization: Bearer ${CERTIQ_TOKEN}')
fi

say() { printf '\n# %s\n' "$*"; }

# call SERVICE/METHOD: requests as JSON from stdin, one after the other; answers to stdout.
call() { grpcurl "${flags[@]}" -d @ "$server" "certiq.v1.$1"; }

# field NAME: its first value in the JSON of stdin.
field() { sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}$/\1/p" | sed -n 1p; }

# tensor FILE HEADER-BYTES SKIP TAKE: bytes of a safetensors file, as JSON wants them.
tensor() { dd if="$data/$1.safetensors" iflag=skip_bytes,count_bytes skip=$(($2 + $3)) count="$4" status=none | base64 -w 0; }

# W is F32 [384, 384]; X is F16 [2048, 384], of which 1024 rows do here.
weights() { tensor weights 208 0 $((384 * 384 * 4)); }
rows() { tensor activations 184 $(($1 * 384 * 2)) $((512 * 384 * 2)); }

say "Services, from reflection; a message, described"
grpcurl "${flags[@]}" "$server" list
grpcurl "${flags[@]}" "$server" describe certiq.v1.AccumulateRequest

say "A calibration, filled by one stream of two chunks"
calibration="$(call CalibrationService/CreateCalibration <<<'{"features": 384, "labels": ["walk"], "held_out_fraction": 0.25}' | field id)"
echo "$calibration"
call CalibrationService/Accumulate <<JSON
{"header": {"calibration_id": "$calibration", "stream_id": "rank-0", "x": "DATA_TYPE_F16"}}
{"chunk": {"sequence": 0, "x": "$(rows 0)"}}
{"chunk": {"sequence": 1, "x": "$(rows 512)"}}
JSON
call CalibrationService/FinalizeCalibration <<<"{\"calibration_id\": \"$calibration\", \"expected_tokens\": 1024}"
call CalibrationService/ListCalibrations <<<'{"label": "walk"}' | field id
call CalibrationService/GetCalibration <<<"{\"calibration_id\": \"$calibration\"}" | field sums_sha256

say "Its sums for the fit go into another calibration: what is exported is imported as it is, under a name"
copy="$(call CalibrationService/CreateCalibration <<<'{"features": 384, "labels": ["walk-copy"]}' | field id)"
call CalibrationService/ExportStatistics <<<"{\"calibration_id\": \"$calibration\"}" |
  sed "s/\"calibration_id\": \"$calibration\"/\"calibration_id\": \"$copy\", \"stream_id\": \"sums\"/" |
  call CalibrationService/ImportStatistics | field tokens
call CalibrationService/DeleteCalibration <<<"{\"calibration_id\": \"$copy\"}"

say "A job: queued, watched, read"
job="$(
  call JobService/CreateJob <<JSON | field id
{"header": {"layer_name": "walk", "calibration_id": "$calibration", "spec": {"bits": 4},
            "weight": {"name": "w", "dtype": "DATA_TYPE_F32", "shape": [384, 384]}}}
{"weight": {"data": "$(weights)"}}
JSON
)"
echo "$job"
call JobService/WatchJob <<<"{\"job_id\": \"$job\"}" | field state
call JobService/GetJob <<<"{\"job_id\": \"$job\"}"
call JobService/ListJobs <<<"{\"calibration_id\": \"$calibration\"}" | field id
call JobService/ReadResult <<<"{\"job_id\": \"$job\"}" | field relative_error

say "A job that has ended stays as it is, whoever cancels it; then all of it is deleted"
call JobService/CancelJob <<<"{\"job_id\": \"$job\"}" | field state
call JobService/DeleteJob <<<"{\"job_id\": \"$job\"}"
call CalibrationService/DeleteCalibration <<<"{\"calibration_id\": \"$calibration\"}"

say "One layer in one call: its relative error, and the bound of its error"
answer="$(
  call QuantizationService/Quantize <<JSON
{"header": {"spec": {"bits": 4, "order": "ORDER_DECREASING_NORM"},
            "weight": {"name": "w", "dtype": "DATA_TYPE_F32", "shape": [384, 384]},
            "x": {"name": "x", "dtype": "DATA_TYPE_F16", "shape": [1024, 384]}}}
{"weight": {"data": "$(weights)"}}
{"activation": {"x": "$(rows 0)"}}
{"activation": {"row_offset": 512, "x": "$(rows 512)"}}
JSON
)"
field relative_error <<<"$answer"
field l2_bound <<<"$answer"

say "Nonsense: the answer names the field, what was expected and what came"
call QuantizationService/Quantize 2>&1 <<'JSON' || true
{"header": {"spec": {"bits": 9}, "weight": {"dtype": "DATA_TYPE_F32", "shape": [1, 1]},
            "x": {"dtype": "DATA_TYPE_F32", "shape": [1, 1]}}}
JSON
