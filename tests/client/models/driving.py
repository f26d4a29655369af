"""certiq-quantize-model run in this process, and what it said and left."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import unpack
from certiq.model.cli import main
from safetensors.torch import save_file

# Small enough for a run to take less than a second.
TEXT = ["--sequences", "8", "--sequence-length", "32", "--batch-size", "4", "--quiet"]
WINDOW = 32
EVALUATED_TOKENS = 512
EVALUATION = ["--evaluation-tokens", str(EVALUATED_TOKENS), "--evaluation-window", str(WINDOW)]


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    """Of stdout: the plan and the summary."""
    err: str
    output: Path
    text: Path
    """What it was calibrated on, unless flags said another."""

    def succeeded(self) -> "Outcome":
        assert self.status == 0, self.err
        return self

    def refused(self, *words: str) -> "Outcome":
        """In one sentence that has these words, before there is a checkpoint."""
        assert self.status in (1, 2), f"status {self.status}: {self.out}{self.err}"
        sentences = [line for line in self.err.splitlines() if not line.startswith("warning: ")]
        assert len(sentences) == 1, self.err
        assert sentences[0].startswith("certiq-quantize-model: ")
        for word in words:
            assert word in sentences[0]
        assert not self.left_a_checkpoint()
        return self

    def left_a_checkpoint(self) -> bool:
        return any((self.output / name).exists() for name in ("config.json", "report.json"))

    def report(self) -> dict[str, Any]:
        return json.loads((self.output / "report.json").read_text())

    def config(self) -> dict[str, Any]:
        return json.loads((self.output / "config.json").read_text())

    def tensors(self) -> dict[str, torch.Tensor]:
        return unpack.tensors_of(self.output)


class Driver:
    """Runs the command; flags that are given again win over these."""

    def __init__(
        self, server: str, text: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._server = server
        self.text = text
        self._folder = folder
        self._capsys = capsys
        self._runs = 0

    def __call__(
        self,
        model: Path,
        *flags: object,
        output: Path | None = None,
        text: Path | str | None = None,
    ) -> Outcome:
        """`output`: a new folder where none is given; `text` "": the flags say it."""
        if output is None:
            self._runs += 1
            output = self._folder / f"output-{self._runs}"
        text = self.text if text is None else text
        # What saving a model showed is not the command's.
        self._capsys.readouterr()
        status = main(
            [
                *("--model", str(model), "--output", str(output), "--server", self._server),
                *(("--calibration", str(text)) if text else ()),
                *TEXT,
                *(str(flag) for flag in flags),
            ]
        )
        said = self._capsys.readouterr()
        return Outcome(status, said.out, said.err, output, self.text)

    def evaluated(self, model: Path, *flags: object, **where: Any) -> Outcome:  # noqa: ANN401
        """With perplexities of the calibration's text."""
        return self(model, "--evaluation", self.text, *EVALUATION, *flags, **where)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a folder's model.safetensors."""
    tensors = unpack.tensors_of(folder)
    change(tensors)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def edit(path: Path, **changes: object) -> None:
    """Changes keys of a JSON file, which may be new."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes, indent=2))


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def logits(model: Any, seed: int = 5, vocabulary: int = 160) -> torch.Tensor:  # noqa: ANN401
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (2, 24), generator=made)
    return model(input_ids=ids).logits.float()


@torch.no_grad()
def perplexity(model: Any, text: Path) -> float:  # noqa: ANN401
    """Of the windows that EVALUATION asks for, by transformers' own loss."""
    ids = [int(word[1:]) for word in text.read_text().split()[:EVALUATED_TOKENS]]
    windows = torch.tensor(ids).reshape(-1, WINDOW)
    return math.exp(model.eval()(input_ids=windows, labels=windows).loss.item())
