"""Calibrations from a model that runs: the inputs of each linear go to the service."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from certiq.calibration import ActivationStream, Calibration
from certiq.client import Client
from certiq.errors import Error
from certiq.jobs import Job
from certiq.layer import Layer
from certiq.spec import SpecLike
from certiq.torch.linears import Selection, find_linears, set_weight, weight_of
from certiq.torch.ranks import Ranks
from certiq.torch.sums import GramAccumulator
from certiq.torch.taps import InputTap

Sums = Literal["server", "client"]
# The server holds out blocks of this size where sequences are not marked.
BLOCK_ROWS = 256


class RecordingError(RuntimeError):
    """Something went wrong on one of the ranks; the message says on which."""


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Errors of the service say which linear they are about."""
    try:
        yield
    except Error as error:
        raise error.of(name) from error


@dataclass
class RecordedGroup:
    """Linears that read the same tensor, and the calibration of it."""

    name: str
    """The name of the linear that reads it first."""
    features: int
    members: tuple[str, ...]
    calibration: Calibration
    tokens: int = 0
    """The tokens of all ranks together, held-out ones included."""


@dataclass
class _Local:
    """The part of one group that this rank has."""

    calibration: Calibration
    stream: ActivationStream | None = None
    sums: GramAccumulator | None = None
    tokens: int = 0


@dataclass
class _Told:
    """The message of a rank to the others about one group."""

    features: int
    members: tuple[str, ...]
    tokens: int
    stream_ids: tuple[str, ...] = field(default_factory=tuple)


def record(
    model: nn.Module,
    client: Client,
    *,
    select: Selection | None = None,
    sums: Sums = "server",
    held_out_fraction: float = 0.0,
    sequence_rows: int = 0,
    share_inputs: bool = True,
    label: str = "",
    ttl: float | None = None,
    process_group: Any = None,
) -> Recording:
    """Records what the linears (nn.Linear, Conv1D) of a model read while it runs in a `with` block.

        with certiq.torch.record(model, client) as recording:
            for batch in batches:
                model(**batch)
        layers = recording.quantize(certiq.Spec(bits=4, format="gptq"))

    Linears that read the same tensor (q, k and v; gate and up) share a calibration. `select(name,
    module)` picks the linears; all of them unless given. sums="server" streams the rows;
    sums="client" adds up X^T X on the tensors' own device and imports it, which sends N^2 numbers
    instead of tokens x N. `held_out_fraction` of the rows, in blocks of 256 or `sequence_rows`, are
    kept apart: the same rows either way. Rows of padding (a two-dimensional `attention_mask` given
    by name to the model) are left out. `label` stands in front of the groups' names in the
    calibrations' labels.

    Under torch.distributed every rank enters, runs its share of the data and leaves: all of them
    fill the same calibrations, rank r as stream "rank-r", and each token counts once. Leaving is a
    collective call; it finalizes the calibrations, or raises on every rank if one failed.

    Experts that transformers 5 keeps as one tensor are no linears: certiq.torch.take_experts_apart.
    """
    if sums not in ("server", "client"):
        raise ValueError(f"sums: expected 'server' or 'client', got {sums!r}")
    linears = find_linears(model, select)
    if not linears:
        raise ValueError("record: no linears in the model, or none selected")
    options = _Options(sums, held_out_fraction, sequence_rows, label, ttl)
    return Recording(model, linears, client, options, share_inputs, Ranks(process_group))


@dataclass(frozen=True)
class _Options:
    sums: Sums
    held_out_fraction: float
    sequence_rows: int
    label: str
    ttl: float | None


class Recording:
    """Made by record(). After the `with` block `groups` has the finalized calibrations."""

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Module],
        client: Client,
        options: _Options,
        share_inputs: bool,
        ranks: Ranks,
    ) -> None:
        self.groups: dict[str, RecordedGroup] = {}
        self.unreached: tuple[str, ...] = ()
        """Linears that no token came to; they have no calibration."""
        self._model = model
        self._linears = dict(linears)
        self._client = client
        self._options = options
        self._ranks = ranks
        self._stream_id = f"rank-{ranks.rank}"
        self._local: dict[str, _Local] = {}
        self._tap = InputTap(linears, self._take, share_inputs=share_inputs)
        self._mask_hook: Any = None
        self._id = ""

    def __enter__(self) -> Recording:
        # Every rank asks for the same calibrations: the request's id makes them one.
        self._id = self._ranks.from_first(uuid.uuid4().hex)
        self._mask_hook = self._model.register_forward_pre_hook(self._see_mask, with_kwargs=True)
        self._tap.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tap.__exit__(kind, error, trace)
        self._mask_hook.remove()
        failure: BaseException | None = error
        told: dict[str, _Told] = {}
        if failure is None:
            try:
                told = {name: self._close(name, local) for name, local in self._local.items()}
            except Exception as closing:
                failure = closing
        if failure is not None:
            for local in self._local.values():
                if local.stream is not None:
                    local.stream.abort()
        self._agree(failure, told)
        if failure is not None and error is None:
            raise failure

    def calibration_of(self, linear: str) -> Calibration:
        for group in self.groups.values():
            if linear in group.members:
                return group.calibration
        raise KeyError(f"{linear}: not recorded")

    def quantize(
        self,
        spec: SpecLike = None,
        *,
        names: Sequence[str] | None = None,
        done: Callable[[str, Layer], None] | None = None,
    ) -> dict[str, Layer]:
        """Quantizes the recorded linears (or those named), all submitted at once; by their names.

        Each rank may take a share of the names. Those that no token reached are not among them.
        """
        wanted = [name for group in self.groups.values() for name in group.members]
        if names is not None:
            unknown = sorted(set(names) - set(wanted))
            if unknown:
                raise KeyError(f"not recorded: {', '.join(unknown)}")
            wanted = list(names)
        jobs: dict[str, Job] = {}
        for name in wanted:
            with _about(name):
                jobs[name] = self._client.submit(
                    weight_of(self._linears[name]),
                    calibration=self.calibration_of(name),
                    spec=spec,
                    name=name[:256],
                )
        layers: dict[str, Layer] = {}
        for name, job in jobs.items():
            with _about(name):
                layers[name] = job.result()
            job.delete()
            if done is not None:
                done(name, layers[name])
        return layers

    def apply(self, layers: Mapping[str, Layer]) -> None:
        """Writes the dequantized weights into the model."""
        for name, layer in layers.items():
            set_weight(self._linears[name], torch.from_numpy(layer.dequantized()))

    def delete(self) -> None:
        """Deletes the calibrations; under torch.distributed on one rank."""
        for group in self.groups.values():
            group.calibration.delete()

    def _see_mask(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        mask = keywords.get("attention_mask")
        partial = isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all())
        self._tap.mask = mask.bool() if partial and mask is not None else None

    def _take(self, name: str, x: torch.Tensor) -> None:
        with _about(name):
            local = self._local.get(name)
            if local is None:
                local = self._local[name] = self._open(name, x)
            local.tokens += x.shape[0]
            if local.stream is not None:
                local.stream.send(x)
            if local.sums is not None:
                local.sums.add(x)

    def _open(self, name: str, x: torch.Tensor) -> _Local:
        local = _Local(self._calibration(name, x.shape[-1]))
        if self._options.sums == "server":
            local.stream = local.calibration.stream(self._stream_id)
        else:
            local.sums = GramAccumulator(
                x.shape[-1],
                x.device,
                stream_id=self._stream_id,
                held_out_fraction=self._options.held_out_fraction,
                block_rows=self._options.sequence_rows or BLOCK_ROWS,
            )
        return local

    def _calibration(self, name: str, features: int) -> Calibration:
        options = self._options
        return self._client.calibration(
            features,
            held_out_fraction=options.held_out_fraction,
            sequence_rows=options.sequence_rows,
            labels=[f"{options.label}{name}"[:256]],
            ttl=options.ttl,
            keep=True,
            request_id=f"{self._id}-{uuid.uuid5(uuid.NAMESPACE_OID, name).hex}",
        )

    def _close(self, name: str, local: _Local) -> _Told:
        group = self._tap.groups[name]
        told = _Told(group.features, tuple(group.members), local.tokens)
        if local.stream is not None:
            with _about(name):
                local.stream.close()
            told.stream_ids = (self._stream_id,)
        if local.sums is not None:
            told.stream_ids = tuple(self._import(local.calibration, local.sums))
        return told

    def _import(self, calibration: Calibration, sums: GramAccumulator) -> list[str]:
        stream_ids = []
        for portion, held_out in ((sums.fit, False), (sums.held_out, True)):
            if portion is None or portion.tokens == 0:
                continue
            stream_id = self._stream_id + ("/held-out" if held_out else "")
            calibration.import_statistics(
                stream_id=stream_id,
                gram=portion.gram,
                tokens=portion.tokens,
                held_out=held_out,
            )
            stream_ids.append(stream_id)
        return stream_ids

    def _agree(self, failure: BaseException | None, told: dict[str, _Told]) -> None:
        """All ranks learn what each has; the first one finalizes."""
        mine = None if failure is None else f"{type(failure).__name__}: {failure}"
        answers = self._ranks.gather((mine, told))
        failures = [
            f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text is not None
        ]
        if failures:
            if failure is None:
                raise RecordingError("; ".join(failures))
            return
        streams: dict[str, list[str]] = {}
        for _, groups in answers:
            for name, own in groups.items():
                self._merge(name, own)
                streams.setdefault(name, []).extend(own.stream_ids)
        reached = {name for group in self.groups.values() for name in group.members}
        self.unreached = tuple(name for name in self._linears if name not in reached)
        self._finalize(streams)

    def _merge(self, name: str, own: _Told) -> None:
        group = self.groups.get(name)
        if group is None:
            local = self._local.get(name)
            calibration = local.calibration if local else self._calibration(name, own.features)
            self.groups[name] = RecordedGroup(
                name, own.features, own.members, calibration, own.tokens
            )
            return
        if set(group.members) != set(own.members):
            raise RecordingError(
                f"{name} shares its input with {group.members} on one rank and with "
                f"{own.members} on another: record with share_inputs=False"
            )
        group.tokens += own.tokens

    def _finalize(self, streams: Mapping[str, Sequence[str]]) -> None:
        error: str | None = None
        if self._ranks.rank == 0:
            try:
                for name, group in self.groups.items():
                    group.calibration.finalize(
                        expected_tokens=group.tokens, expected_streams=streams[name]
                    )
            except Exception as failed:
                if self._ranks.count == 1:
                    raise
                error = f"rank 0: {type(failed).__name__}: {failed}"
        error = self._ranks.from_first(error)
        if error is not None:
            raise RecordingError(error)
        if self._ranks.rank != 0:
            for group in self.groups.values():
                group.calibration.refresh()
