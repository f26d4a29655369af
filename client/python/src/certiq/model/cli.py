"""certiq-quantize-model: from a model on disk to a quantized checkpoint, through a server."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certiq import Client, Error, Spec, Tls
from certiq.model.errors import UsageError
from certiq.model.settings import DENSE, PACKED, RunSettings

if TYPE_CHECKING:
    from certiq.model.estimate import Estimate
    from certiq.model.plan import Plan

DEFAULT_FORMAT = "compressed_tensors"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="certiq-quantize-model",
        description="Quantizes a model of transformers, one decoder layer in memory at a time.",
        epilog="An interrupted run goes on where it stopped when it is started again.",
    )
    where = p.add_argument_group("what and where")
    where.add_argument("--model", type=Path, required=True, help="a checkpoint folder or a .gguf")
    where.add_argument(
        "--calibration",
        type=Path,
        action="append",
        required=True,
        help="text in UTF-8, or .jsonl with a text or the messages of a chat in each line; may be "
        "given several times; self: samples of the model's own",
    )
    where.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    where.add_argument("--server", required=True, metavar="HOST:PORT")
    where.add_argument("--tls-ca", type=Path, help="PEM; speak TLS and trust these authorities")
    where.add_argument("--tls-cert", type=Path, help="PEM; client certificate")
    where.add_argument("--tls-key", type=Path, help="PEM; its key")
    where.add_argument("--token-file", type=Path, help="or the variable CERTIQ_TOKEN")
    where.add_argument("--restart", action="store_true", help="forget an unfinished run")

    spec = p.add_argument_group("how (unset: the server's defaults)")
    spec.add_argument("--method", choices=("optq", "qronos", "nearest"))
    spec.add_argument("--bits", type=int, default=4)
    spec.add_argument("--group-size", type=int, default=0, help="0: one scale a row")
    spec.add_argument("--asymmetric", action="store_true", help="grids with zero points")
    spec.add_argument("--scale", choices=("absmax", "mse", "piso", "compensated"))
    spec.add_argument(
        "--scale-objective", choices=("inputs", "quantized_inputs", "mixed", "data_free")
    )
    spec.add_argument("--scale-passes", type=int)
    spec.add_argument("--scale-trials", type=int)
    spec.add_argument("--polish", type=int)
    spec.add_argument("--group-scales", choices=("static", "dynamic"))
    spec.add_argument("--order", choices=("natural", "decreasing_norm"))
    spec.add_argument("--damping", help="held_out, relative_trace:0.01, ...")
    spec.add_argument("--on-failure", choices=("fail", "nearest"))
    spec.add_argument("--quality", choices=("fast", "balanced", "best"))
    spec.add_argument("--rounding", choices=("nearest", "stochastic"))
    spec.add_argument("--seed", type=int)
    names = [name.replace("_", "-") for name in PACKED + DENSE]
    spec.add_argument(
        "--format",
        default=DEFAULT_FORMAT.replace("_", "-"),
        choices=[*names, "gptq_v2"],
        help="who loads which: python -m certiq.readers",
    )
    spec.add_argument(
        "--recipe",
        type=Path,
        help="YAML that says it module by module, and wins over the flags above",
    )
    spec.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the rest")

    text = p.add_argument_group("calibration and evaluation")
    text.add_argument("--sequences", type=int, default=128)
    text.add_argument("--sequence-length", type=int, default=512)
    text.add_argument("--held-out-fraction", type=float)
    text.add_argument(
        "--one-pass",
        action="store_true",
        help="all linears of a layer see it in float, instead of what was quantized before them",
    )
    text.add_argument("--evaluation", type=Path, help="text for perplexity before and after")
    text.add_argument("--evaluation-tokens", type=int, default=16384)
    text.add_argument("--evaluation-window", type=int, default=512)
    text.add_argument("--no-float-evaluation", action="store_true", help="only perplexity after")
    text.add_argument("--ignore", action="append", default=[], metavar="REGEX")
    text.add_argument("--layers", type=int, help="only the first so many decoder layers")
    text.add_argument(
        "--no-load-checks",
        action="store_true",
        help="compare neither the float model with transformers' own first nor, at the end, the "
        "written one as transformers loads it with what it stands for",
    )
    text.add_argument(
        "--min-share",
        type=float,
        default=0.0,
        help="an error where less of the layers' weights would be quantized, 0 to 1",
    )
    text.add_argument("--batch-size", type=int, default=8)
    text.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="the type that the model is run in; bfloat16 for checkpoints that have it",
    )
    text.add_argument(
        "--state-memory",
        type=float,
        default=16.0,
        metavar="GB",
        help="what hidden states may take; beyond it they lie on disk, below --output",
    )
    text.add_argument(
        "--device", default="cpu", help="of torch; several (cuda:0,cuda:1) divide the sequences"
    )
    p.add_argument("--dry-run", action="store_true", help="show the plan, and stop there")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def settings_from(arguments: argparse.Namespace) -> RunSettings:
    spec = Spec(
        method=arguments.method,
        bits=arguments.bits,
        symmetric=not arguments.asymmetric,
        group_size=arguments.group_size,
        group_scales=arguments.group_scales,
        scale=arguments.scale,
        scale_objective=arguments.scale_objective,
        scale_passes=arguments.scale_passes,
        scale_trials=arguments.scale_trials,
        polish=arguments.polish,
        rounding=arguments.rounding,
        seed=arguments.seed,
        order=arguments.order,
        damping=arguments.damping,
        on_failure=arguments.on_failure,
        quality=arguments.quality,
        format=arguments.format.replace("-", "_"),
        compare_nearest=None,
    )
    calibration = tuple(arguments.calibration)
    if Path("self") in calibration:
        if len(calibration) > 1:
            raise UsageError("calibration: expected files or self, got both")
        calibration = ()
    return RunSettings(
        model=arguments.model,
        output=arguments.output,
        calibration=calibration,
        recipe=arguments.recipe,
        spec=spec,
        sequences=arguments.sequences,
        sequence_length=arguments.sequence_length,
        sequential=not arguments.one_pass,
        held_out_fraction=arguments.held_out_fraction,
        evaluation=arguments.evaluation,
        evaluation_tokens=arguments.evaluation_tokens,
        evaluation_window=arguments.evaluation_window,
        evaluate_float=not arguments.no_float_evaluation,
        ignore=tuple(arguments.ignore),
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        compute_dtype=arguments.compute_dtype,
        state_memory=arguments.state_memory,
        device=arguments.device,
        blocks=arguments.layers,
        min_share=arguments.min_share,
        load_checks=not arguments.no_load_checks,
    )


def client_from(arguments: argparse.Namespace) -> Client:
    tls = None
    if arguments.tls_ca or arguments.tls_cert:
        tls = Tls(ca=arguments.tls_ca, cert=arguments.tls_cert, key=arguments.tls_key)
    token = os.environ.get("CERTIQ_TOKEN")
    if arguments.token_file is not None:
        token = arguments.token_file.read_text(encoding="utf-8").strip()
    return Client(arguments.server, tls=tls, token=token)


def versions() -> dict[str, str]:
    import torch

    found = {}
    for name in ("certiq", "torch", "transformers", "compressed-tensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    found["torch threads"] = str(torch.get_num_threads())
    return found


def quantize_model(
    client: Client,
    settings: RunSettings,
    *,
    restart: bool = False,
    dry_run: bool = False,
    bar: bool = True,
) -> dict[str, Any] | None:
    """Runs to the end, or goes on with what an earlier run left; returns report.json's content, or
    None after a dry run."""
    import torch
    from tqdm.auto import tqdm

    from certiq.model.checkpoint import CheckpointWriter, scale_dtype
    from certiq.model.estimate import estimate
    from certiq.model.journal import Journal, write_text
    from certiq.model.lockstep import BlockStack
    from certiq.model.plan import described, make_plan
    from certiq.model.proof import prove_output
    from certiq.model.recipe import Recipe
    from certiq.model.report import model_report
    from certiq.model.report_html import render
    from certiq.model.run import ModelRun
    from certiq.model.source import ModelSource

    settings.check()
    compute_dtype = getattr(torch, settings.compute_dtype)
    source = ModelSource(settings.model, compute_dtype, settings.devices()[0])
    if compute_dtype == torch.bfloat16 and source.stored_dtype != "bfloat16":
        raise UsageError(
            f"compute_dtype: expected float32 for a checkpoint in {source.stored_dtype}, whose "
            "weights bfloat16 would round"
        )
    settings = dataclasses.replace(
        settings, spec=dataclasses.replace(settings.spec, scale_dtype=scale_dtype(settings, source))
    )
    recipe = (
        Recipe.of_flags(settings.spec, settings.ignore)
        if settings.recipe is None
        else Recipe.read(settings.recipe, settings.spec, settings.ignore)
    )
    stack = BlockStack(source.model)
    plan = make_plan(source, stack, settings, recipe)
    _show_plan(plan, settings, estimate(settings, source, stack, plan))
    if dry_run:
        return None
    settings.output.mkdir(parents=True, exist_ok=True)
    if (settings.output / "report.json").exists() and not restart:
        raise UsageError(f"{settings.output} holds a finished run: another --output, or --restart")
    journal = Journal(settings.output)
    writer = CheckpointWriter(settings, source, journal, plan)
    writer.check_values()
    run = ModelRun(client, settings, source, stack, plan, journal)
    resumed = journal.open(settings.fingerprint(source.identity()), restart=restart)
    # Of the run that this one is to replace; it would keep this one from going on.
    (settings.output / "report.json").unlink(missing_ok=True)
    done = run.done()
    if resumed and bar:
        print(f"goes on: {len(done)} of {len(plan.all())} linears are done", file=sys.stderr)
    with tqdm(total=len(plan.all()), initial=len(done), unit="linear", disable=not bar) as progress:

        def step(name: str, error: float) -> None:
            progress.update()
            progress.set_postfix_str(f"{name} {error:.3g}")

        run.run(step)
    written = writer.write()
    proof = prove_output(settings, source, stack, plan, journal, run.sample)
    assert run.checked is not None
    report = model_report(
        settings.described(),
        [journal.read_report(name) for name in plan.all()],
        left_float=plan.float_modules,
        plan=described(plan),
        evaluation=run.evaluation(),
        seconds=run.seconds(),
        versions=versions(),
        loads_in=[str(reader) for reader in settings.loads_in()],
        texts=run.texts,
        float_model=run.checked.logits,
        tensor_bytes=written.tensor_bytes,
        proof=proof.described(),
        files={"copied": written.copied, "not_copied": written.not_copied},
    )
    write_text(settings.output / "recipe.yaml", recipe.resolved())
    write_text(settings.output / "report.html", render(report, f"{settings.model_name}, quantized"))
    write_text(settings.output / "report.json", json.dumps(report, indent=1) + "\n")
    journal.remove()
    return report


def _show_plan(plan: Plan, settings: RunSettings, needs: Estimate) -> None:
    print("plan:")
    for line in plan.lines():
        print(line)
    print(f"  {needs}")
    warnings = list(plan.warnings)
    if not settings.loads_in():
        warnings.append(
            f"no reader is known to load {settings.spec.format} with these bits, zero points, "
            "groups and order; help(certiq.loads_in) tells what each takes"
        )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sys.stdout.flush()


def summary(report: Mapping[str, Any]) -> str:
    totals = report["totals"]
    lines = [
        f"{totals['linears']} linears, {totals['bits_per_weight']:.3f} bits a weight, "
        f"mean relative error {totals['mean_relative_error'] or 0.0:.4f}",
    ]
    evaluation = report["evaluation"]
    for text, quality in evaluation.items():
        before = quality["float"]
        line = f"{'' if before is None else f'{before:.2f} -> '}{quality['quantized']:.2f}"
        if before is not None:
            line += (
                f", KL {quality['kl_divergence']:.4f}, the same first token in "
                f"{100 * quality['top1_agreement']:.1f} %, flips {100 * quality['flips']:.1f} %"
            )
        lines.append(f"perplexity on {text.replace('_', ' ')}: {line}")
    readers = report["loads_in"]
    lines.append(f"loads in: {'; '.join(readers) or 'no reader that is known'}")
    proof = report["proof"]
    if proof["loaded"].get("linears"):
        lines.append(
            f"loaded by {proof['loaded']['route']}: {len(proof['loaded']['linears'])} linears and "
            "a sequence's logits compared"
        )
    lines += proof["warnings"]
    if totals["experts"] is not None:
        coverage = totals["experts"]
        lines.append(
            f"experts saw {coverage['fewest_tokens']} to {coverage['most_tokens']} tokens, "
            f"{coverage['median_tokens']} in the middle; {coverage['without_tokens']} of "
            f"{coverage['linears']} linears none"
        )
    if totals["fell_back_to_nearest"]:
        lines.append(f"fell back to plain rounding: {', '.join(totals['fell_back_to_nearest'])}")
    if totals["underflowed_rows"]:
        lines.append(
            f"rows whose weights were too small for their scales and became zeros: "
            f"{totals['underflowed_rows']} (the certificates' underflow names them)"
        )
    if totals["with_notes"]:
        named = totals["with_notes"]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        lines.append(f"see the report's notes on {', '.join(named[:3])}{more}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        settings = settings_from(arguments)
        with client_from(arguments) as client:
            report = quantize_model(
                client,
                settings,
                restart=arguments.restart,
                dry_run=arguments.dry_run,
                bar=not arguments.quiet,
            )
    except (UsageError, OSError) as error:
        print(f"certiq-quantize-model: {error}", file=sys.stderr)
        return 2
    except Error as error:
        print(f"certiq-quantize-model: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncertiq-quantize-model: interrupted; start it again to go on", file=sys.stderr)
        return 130
    if report is None:
        return 0
    print(summary(report))
    failures = report["proof"]["failures"]
    for failure in failures:
        print(f"certiq-quantize-model: {failure}", file=sys.stderr)
    return 1 if failures else 0
