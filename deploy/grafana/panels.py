"""What the dashboard shows: every panel with its queries, row by row."""

from dataclasses import dataclass

HERE = 'job=~"$job",instance=~"$instance"'
SUCCEEDED = 'outcome="succeeded"'
STEP = "$__rate_interval"
# λ used / λ asked is 1; Prometheus 3 writes bounds as floats.
AS_ASKED = 'le=~"1|1[.]0"'


@dataclass(frozen=True)
class Query:
    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    queries: tuple[Query, ...]
    about: str = ""
    stacked: bool = False
    # For single numbers: from where on yellow, then red.
    limits: tuple[float, float] | None = None
    top: float | None = None


def one(title: str, unit: str, expression: str, legend: str, about: str = "") -> Panel:
    return Panel(title, unit, (Query(expression, legend),), about)


def rate(family: str, labels: str = "") -> str:
    return f"rate({family}{{{HERE}{',' + labels if labels else ''}}}[{STEP}])"


def quantiles(
    family: str, by: str, labels: str = "", levels: tuple[float, ...] = (0.5, 0.9)
) -> tuple[Query, ...]:
    """What has no observations has no quantile: NaN is not drawn, nor named in the legend."""
    names = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(",")[:-1])
    buckets = f"sum by ({by}) ({rate(family + '_bucket', labels)})"
    return tuple(
        Query(
            f"histogram_quantile({level}, {buckets}) >= 0",
            f"{names} p{round(level * 100)}".strip(),
        )
        for level in levels
    )


NUMBERS = (
    Panel(
        "Instances up",
        "none",
        (Query('sum(up{job=~"$job",instance=~"$instance"})', ""),),
    ),
    Panel(
        "Jobs ended in the last hour",
        "none",
        (Query(f"sum(increase(certiq_jobs_total{{{HERE}}}[1h]))", ""),),
    ),
    Panel(
        "Queue",
        "percentunit",
        (Query(f"max(certiq_queue_depth{{{HERE}}} / certiq_queue_limit{{{HERE}}})", ""),),
        limits=(0.5, 0.8),
    ),
    Panel(
        "Workers busy",
        "percentunit",
        (Query(f"sum(certiq_workers_busy{{{HERE}}}) / sum(certiq_workers{{{HERE}}})", ""),),
    ),
    Panel(
        "Memory reserved",
        "percentunit",
        (
            Query(
                f"max(certiq_memory_reserved_bytes{{{HERE}}}"
                f" / certiq_memory_budget_bytes{{{HERE}}})",
                "",
            ),
        ),
        limits=(0.75, 0.95),
    ),
    Panel(
        "Alerts firing",
        "none",
        (Query('count(ALERTS{alertname=~"Certiq.*",alertstate="firing"}) or on () vector(0)', ""),),
        limits=(1, 3),
    ),
)

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Throughput",
        (
            one(
                "Weights quantized",
                "short",
                f"sum by (method, bits) ({rate('certiq_weights_quantized_total')}) > 0",
                "{{method}} {{bits}} bits",
                "Weights a second, of layers that ended.",
            ),
            one(
                "Activation rows folded",
                "short",
                f"sum by (instance) ({rate('certiq_activation_rows_total')})",
                "{{instance}}",
                "Tokens a second that went into sums.",
            ),
            one(
                "Floating point operations",
                "flops",
                f"sum by (phase) ({rate('certiq_flops_total')})",
                "{{phase}}",
                "By the formulas' count: m N² statistics, N³/3 factor, R N² rounding. Rounding and"
                " factor are counted when a layer ends.",
            ),
            one(
                "Jobs ended",
                "cps",
                f"sum by (outcome) ({rate('certiq_jobs_total')})",
                "{{outcome}}",
            ),
        ),
    ),
    (
        "Queue and workers",
        (
            Panel(
                "Queue",
                "none",
                (
                    Query(f"sum(certiq_queue_depth{{{HERE}}})", "waiting"),
                    Query(f"sum(certiq_queue_limit{{{HERE}}})", "limit"),
                ),
                "Jobs that upload take places too, but do not wait yet.",
            ),
            Panel(
                "Workers",
                "none",
                (
                    Query(f"sum(certiq_workers_busy{{{HERE}}})", "busy"),
                    Query(f"sum(certiq_workers{{{HERE}}})", "all"),
                ),
            ),
            one(
                "Jobs kept, by state",
                "none",
                f"sum by (state) (certiq_jobs{{{HERE}}})",
                "{{state}}",
                "Ended ones stay until their time to live is over.",
            ),
            one(
                "Not taken on",
                "cps",
                f"sum by (reason) ({rate('certiq_rejected_total')})",
                "{{reason}}",
            ),
        ),
    ),
    (
        "Latency",
        (
            Panel(
                "Jobs, from queued to ended",
                "s",
                quantiles(
                    "certiq_job_duration_seconds",
                    "method, le",
                    'outcome!="cancelled"',
                    levels=(0.5, 0.95, 0.99),
                ),
            ),
            Panel(
                "Where a job's time goes (mean)",
                "s",
                (
                    Query(
                        f"sum by (phase) ({rate('certiq_job_seconds_sum')})"
                        f" / sum by (phase) ({rate('certiq_job_seconds_count')})",
                        "{{phase}}",
                    ),
                ),
                stacked=True,
            ),
            Panel(
                "Calls (95 %)",
                "s",
                (
                    Query(
                        "histogram_quantile(0.95, sum by (grpc_method, le)"
                        f" ({rate('grpc_server_handling_seconds_bucket')})) >= 0",
                        "{{grpc_method}}",
                    ),
                ),
                "Streams last as long as their clients send or watch.",
            ),
            one(
                "Calls by code",
                "cps",
                f"sum by (grpc_code) ({rate('grpc_server_handled_total')}) > 0",
                "{{grpc_code}}",
            ),
        ),
    ),
    (
        "Quality",
        (
            Panel(
                "Relative error",
                "percentunit",
                quantiles("certiq_relative_error", "method, bits, le"),
                "Error of the outputs, relative to the outputs. The rules have the targets.",
            ),
            Panel(
                "Bound tightness",
                "percentunit",
                quantiles("certiq_bound_tightness", "method, bits, le"),
                "Damped error divided by its bound. A bound holds, so never above 1; the closer to"
                " 1, the less it gives away.",
                top=1,
            ),
            Panel(
                "Clipped weights",
                "percentunit",
                (
                    Query(
                        f"sum({rate('certiq_clipped_weights_total')})"
                        f" / sum({rate('certiq_weights_quantized_total')})",
                        "share of weights",
                    ),
                ),
            ),
            one(
                "Dead input features",
                "cps",
                f"sum({rate('certiq_dead_features_total')})",
                "features",
                "Features whose activations were all zero; their weights became 0.",
            ),
        ),
    ),
    (
        "Damping (λ)",
        (
            one(
                "Stability failures",
                "cps",
                f"sum by (method, cause) ({rate('certiq_lambda_stability_failures_total')})",
                "{{method}} {{cause}}",
                "Attempts whose factorisation was not accepted.",
            ),
            Panel(
                "λ used / λ asked",
                "short",
                quantiles("certiq_lambda_ratio", "le", levels=(0.5, 0.9, 0.99)),
                "1 where the first attempt was accepted.",
            ),
            Panel(
                "Layers without the λ asked for",
                "percentunit",
                (
                    Query(
                        f"1 - sum({rate('certiq_lambda_ratio_bucket', AS_ASKED)})"
                        f" / sum({rate('certiq_lambda_ratio_count')})",
                        "quantized with a larger one",
                    ),
                    Query(
                        f"sum({rate('certiq_lambda_fallbacks_total')})"
                        f" / sum({rate('certiq_jobs_total', SUCCEEDED)})",
                        "rounded to nearest",
                    ),
                ),
                "Every attempt failed and the spec said so: rounded to nearest.",
            ),
            one(
                "Factors shared",
                "cps",
                f"sum by (result) ({rate('certiq_factor_cache_total')})",
                "{{result}}",
                "Factors that jobs of a calibration asked for: kept from before or made by another"
                " job (hit), or made (miss).",
            ),
        ),
    ),
    (
        "Memory and traffic",
        (
            Panel(
                "Memory budget",
                "bytes",
                (
                    Query(
                        f"sum by (instance) (certiq_memory_reserved_bytes{{{HERE}}})",
                        "reserved {{instance}}",
                    ),
                    Query(
                        f"sum by (instance) (certiq_memory_budget_bytes{{{HERE}}})",
                        "budget {{instance}}",
                    ),
                ),
                "Up to a quarter of the budget is kept for what jobs may share, and given back when"
                " something else needs it.",
            ),
            one(
                "Activations received",
                "Bps",
                f"sum by (instance) ({rate('certiq_activation_bytes_total')})",
                "{{instance}}",
            ),
            Panel(
                "Messages",
                "cps",
                (
                    Query(f"sum({rate('grpc_server_msg_received_total')})", "received"),
                    Query(f"sum({rate('grpc_server_msg_sent_total')})", "sent"),
                ),
            ),
            Panel(
                "Draining since",
                "s",
                (
                    Query(
                        f"(time() - certiq_drain_start_time_seconds{{{HERE}}})"
                        f" * (certiq_drain_start_time_seconds{{{HERE}}} > bool 0)",
                        "{{instance}}",
                    ),
                    Query(f"max(certiq_drain_limit_seconds{{{HERE}}})", "limit"),
                ),
                "0 while it serves.",
            ),
        ),
    ),
)
