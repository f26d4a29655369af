"""Every family of the metrics page: the contract of names, types, labels and all their values."""

import re
from dataclasses import dataclass

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
METHODS = {"nearest", "optq", "qronos"}
BITS = {str(bits) for bits in range(2, 9)}
OUTCOMES = {"succeeded", "failed", "cancelled", "expired"}
CALL = {
    "grpc_service": {
        "certiq.v1.QuantizationService",
        "certiq.v1.CalibrationService",
        "certiq.v1.JobService",
    },
    "grpc_method": set(
        "Quantize CreateCalibration Accumulate ImportStatistics ExportStatistics"
        " FinalizeCalibration GetCalibration ListCalibrations DeleteCalibration CreateJob GetJob"
        " ListJobs CancelJob DeleteJob WatchJob ReadResult".split()
    ),
    "grpc_type": {"unary", "client_stream", "server_stream", "bidi_stream"},
}
CODE = set(
    "OK Canceled Unknown InvalidArgument DeadlineExceeded NotFound AlreadyExists PermissionDenied"
    " ResourceExhausted FailedPrecondition Aborted OutOfRange Unimplemented Internal Unavailable"
    " DataLoss Unauthenticated".split()
)


@dataclass(frozen=True)
class Family:
    type: str
    # A word of the HELP text that tells what is counted, or its unit.
    unit: str
    # Every value that a label may have.
    labels: dict[str, set[str]]


# The contract: names, types, labels and all of their values.
FAMILIES = {
    "certiq_jobs": Family(GAUGE, "jobs", {"state": {"queued", "running", *OUTCOMES}}),
    "certiq_jobs_total": Family(COUNTER, "jobs", {"method": METHODS, "outcome": OUTCOMES}),
    "certiq_job_seconds": Family(
        HISTOGRAM,
        "seconds",
        {
            "method": METHODS,
            "phase": {"queue", "factor", "round", "certify", "reference", "pack"},
        },
    ),
    "certiq_job_duration_seconds": Family(
        HISTOGRAM, "seconds", {"method": METHODS, "outcome": OUTCOMES}
    ),
    "certiq_queue_depth": Family(GAUGE, "jobs", {}),
    "certiq_queue_limit": Family(GAUGE, "places", {}),
    "certiq_workers_busy": Family(GAUGE, "workers", {}),
    "certiq_workers": Family(GAUGE, "threads", {}),
    "certiq_weights_quantized_total": Family(COUNTER, "weights", {"method": METHODS, "bits": BITS}),
    "certiq_activation_rows_total": Family(COUNTER, "rows", {}),
    "certiq_activation_bytes_total": Family(COUNTER, "bytes", {}),
    "certiq_flops_total": Family(
        COUNTER, "operations", {"phase": {"statistics", "factor", "round"}}
    ),
    "certiq_lambda_stability_failures_total": Family(
        COUNTER, "attempts", {"method": METHODS, "cause": {"pivot", "non_finite", "condition"}}
    ),
    "certiq_lambda_fallbacks_total": Family(COUNTER, "layers", {"method": METHODS}),
    "certiq_lambda_ratio": Family(HISTOGRAM, "divided", {}),
    "certiq_relative_error": Family(HISTOGRAM, "ratio", {"method": METHODS, "bits": BITS}),
    "certiq_bound_tightness": Family(HISTOGRAM, "ratio", {"method": METHODS, "bits": BITS}),
    "certiq_clipped_weights_total": Family(COUNTER, "weights", {}),
    "certiq_dead_features_total": Family(COUNTER, "features", {}),
    "certiq_memory_budget_bytes": Family(GAUGE, "bytes", {}),
    "certiq_memory_reserved_bytes": Family(GAUGE, "bytes", {}),
    "certiq_rejected_total": Family(
        COUNTER,
        "not taken on",
        {
            "reason": {
                *("invalid", "not_offered", "queue_full", "over_budget", "quota", "draining"),
            }
        },
    ),
    "certiq_factor_cache_total": Family(COUNTER, "factors", {"result": {"hit", "miss"}}),
    "certiq_drain_start_time_seconds": Family(GAUGE, "seconds", {}),
    "certiq_drain_limit_seconds": Family(GAUGE, "seconds", {}),
    "certiq_build_info": Family(GAUGE, "always 1", {"version": set(), "isa": set()}),
    "grpc_server_started_total": Family(COUNTER, "rpcs", CALL),
    "grpc_server_handled_total": Family(COUNTER, "rpcs", CALL | {"grpc_code": CODE}),
    "grpc_server_msg_received_total": Family(COUNTER, "messages", CALL),
    "grpc_server_msg_sent_total": Family(COUNTER, "messages", CALL),
    "grpc_server_handling_seconds": Family(HISTOGRAM, "seconds", CALL),
}
CLOCKS = ("certiq_job_duration_seconds", "grpc_server_handling_seconds", "certiq_job_seconds")


def family_of(sample: str) -> str:
    if sample in FAMILIES:
        return sample
    return re.sub("_(bucket|count|sum)$", "", sample)
