"""One level of a block through the service."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from google.protobuf.json_format import MessageToDict
from torch import nn

from certiq.calibration import Calibration
from certiq.client import Client
from certiq.errors import Error
from certiq.jobs import Job
from certiq.layer import Layer
from certiq.model.collect import Collected
from certiq.model.journal import DoneLinear, Journal
from certiq.model.levels import joined
from certiq.model.report import linear_report
from certiq.spec import Spec
from certiq.torch.linears import features_of, set_weight, weight_of

# An expert that saw fewer tokens than it has features gets this damping: its sums say nothing about
# most directions, and there is too little to hold out and choose by.
FEW_TOKENS_DAMPING = 0.1


def spec_for(
    spec: Spec, collected: Collected, *, is_expert: bool, is_table: bool
) -> tuple[Spec, list[str]]:
    """The spec for one group, and what differs from the one asked for."""
    if collected.calibration is None:
        plain = Spec(
            method="nearest",
            bits=spec.bits,
            symmetric=spec.symmetric,
            group_size=spec.group_size,
            scale_dtype=spec.scale_dtype,
            scale="absmax" if spec.scale == "absmax" else "mse",
            format=spec.format,
        )
        why = "no token reached it" if is_expert else "nothing called it"
        if is_table:
            why = "a table that is looked up"
        return plain, [f"{why}: plain rounding; its errors are those of the weights themselves"]
    notes: list[str] = []
    changes: dict[str, object] = {}
    if not is_expert:
        return spec, notes
    if spec.method == "qronos":
        changes["method"] = "optq"
        notes.append(
            "expert: routing differs between the float and the quantized model, so OPTQ on what it "
            "sees in the quantized one"
        )
    if collected.prior:
        notes.append(
            f"expert: saw {collected.tokens} tokens; its sums have {collected.prior} tokens' worth "
            "of all experts' beside them"
        )
    if collected.tokens < collected.features:
        changes["damping"] = f"relative_trace:{FEW_TOKENS_DAMPING}"
        notes.append(
            f"saw {collected.tokens} tokens for {collected.features} features: damping "
            f"{FEW_TOKENS_DAMPING} trace/N"
        )
    return dataclasses.replace(spec, **changes), notes  # type: ignore[arg-type]


class LevelQuantizer:
    """Submits the linears of a level, waits for them and writes them to the journal."""

    def __init__(
        self,
        client: Client,
        spec_of: Callable[[str], Spec],
        journal: Journal,
        done: Callable[[str, float], None],
    ) -> None:
        self._client = client
        self._spec_of = spec_of
        self._journal = journal
        self._done = done

    def quantize(
        self,
        block_name: str,
        collected: Sequence[Collected],
        linears: Mapping[str, Sequence[nn.Module]],
        pending: frozenset[str],
        experts: frozenset[str],
    ) -> None:
        """Quantizes those that are `pending` and gives each copy of a module its new weight."""
        identities: list[Calibration] = []
        running: list[tuple[str, Collected, list[str], Job]] = []
        try:
            for own in collected:
                calibration = own.calibration
                for member in own.group.members:
                    if member not in pending:
                        continue
                    name = joined(block_name, member)
                    if calibration is None:
                        calibration = self._identity(
                            own.group.name, features_of(linears[member][0])
                        )
                        identities.append(calibration)
                    spec, notes = spec_for(
                        self._spec_of(name),
                        own,
                        is_expert=own.group.name in experts,
                        is_table=isinstance(linears[member][0], nn.Embedding),
                    )
                    try:
                        job = self._client.submit(
                            weight_of(linears[member][0]),
                            calibration=calibration,
                            spec=spec,
                            name=name[:256],
                        )
                    except Error as error:
                        raise error.of(name) from error
                    running.append((member, own, notes, job))
            for member, own, notes, job in running:
                try:
                    layer = job.result()
                except Error as error:
                    raise error.of(joined(block_name, member)) from error
                weight = torch.from_numpy(layer.dequantized())
                for module in linears[member]:
                    set_weight(module, weight)
                self._write(
                    block_name, member, own, notes, layer, is_expert=own.group.name in experts
                )
                job.delete()
            for calibration in identities:
                calibration.delete()
        except BaseException:
            for *_, job in running:
                _cancel(job)
            raise

    def _identity(self, name: str, features: int) -> Calibration:
        """A stand-in for tokens that never came: every direction counts alike."""
        calibration = self._client.calibration(features, labels=[f"{name}: identity"[:256]])
        calibration.import_statistics(
            stream_id="identity",
            gram=torch.eye(features, dtype=torch.float32),
            tokens=features,
        )
        return calibration.finalize()

    def _write(
        self,
        block_name: str,
        member: str,
        own: Collected,
        notes: list[str],
        layer: Layer,
        *,
        is_expert: bool,
    ) -> None:
        certificate = MessageToDict(
            layer.certificate,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        # Rows' errors and bounds are long; the service's own report has them.
        for name in ("row_error", "row_bound", "row_rounding"):
            certificate.pop(name, None)
        name = joined(block_name, member)
        phases = certificate.get("phase_seconds", {})
        seconds = sum(float(value) for phase, value in phases.items() if phase != "queue")
        report = linear_report(
            name,
            block_name,
            [joined(block_name, other) for other in own.group.members],
            certificate,
            notes,
            seconds,
            routed_tokens=own.tokens if is_expert else None,
            prior_tokens=own.prior,
        )
        self._journal.write(name, DoneLinear(layer.torch(), report))
        self._done(name, float(report["relative_error"]))


def _cancel(job: Job) -> None:
    """As well as it goes: the error that brought us here is what counts."""
    try:
        job.cancel()
    except Exception:
        return
