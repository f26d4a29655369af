"""GPTQ checkpoints in the loaders that read them: GPTQModel, and transformers with optimum."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
import unpack
from certiq.model.cli import main
from programs import Server
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

# What a user writes: no certiq in it. A process of its own, because GPTQModel changes transformers
# when it is imported.
LOAD = """
import sys
import torch, transformers
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file

for folder, routes in (argument.split("=") for argument in sys.argv[1:]):
    logits = {}
    for route in routes.split(","):
        if route == "transformers":
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                device_map="cpu",
                # Only the backend counts; the rest is as the checkpoint says.
                quantization_config=transformers.GPTQConfig(bits=4, backend="gptq_torch"),
            )
        else:
            model = GPTQModel.load(
                folder, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH
            ).model
        packed = [name for name, module in model.named_modules() if hasattr(module, "qweight")]
        with torch.no_grad():
            ids = torch.arange(40)[None] * 7 % model.config.vocab_size
            logits[route] = model.eval()(input_ids=ids).logits.float().contiguous()
        logits[f"{route}.packed"] = torch.tensor(len(packed))
    save_file(logits, f"{folder}.loaded")
"""
GROUPS_IN_NORM_ORDER = ("--group-scales", "dynamic", "--order", "decreasing_norm")


@dataclass(frozen=True)
class Case:
    format: str
    bits: int
    flags: tuple[str, ...] = ()
    model: str = "llama"

    def __str__(self) -> str:
        words = [flag.removeprefix("--") for flag in self.flags]
        return "_".join([self.model, self.format, str(self.bits), *words])

    @property
    def routes(self) -> tuple[str, ...]:
        # transformers initializes a Conv1D's weight, which a packed one has not.
        return ("gptqmodel",) if self.model == "gpt2" else ("gptqmodel", "transformers")


CASES = [
    *(Case("gptq", bits, ("--group-size", "64")) for bits in (2, 3, 4, 8)),
    *(Case("gptq", bits) for bits in (3, 4)),
    *(Case("gptq-v2", bits, ("--group-size", "64", "--asymmetric")) for bits in (2, 3, 4, 8)),
    *(Case("gptq-v2", bits, ("--asymmetric",)) for bits in (3, 4)),
    Case("gptq", 4, ("--group-size", "128")),
    Case("gptq-v2", 4, ("--group-size", "128")),
    Case("gptq", 4, ("--group-size", "32", *GROUPS_IN_NORM_ORDER)),
    Case("gptq-v2", 3, ("--group-size", "32", "--asymmetric", *GROUPS_IN_NORM_ORDER)),
    # Linears that stay float among those that are packed.
    Case("gptq", 4, ("--group-size", "64", "--ignore", "down_proj")),
    Case("gptq-v2", 4, ("--asymmetric", "--layers", "1")),
    *(Case("gptq", 4, ("--group-size", "32"), model) for model in ("opt", "qwen3", "gpt2")),
]


def make(name: str) -> Any:  # noqa: ANN401
    if name != "llama":
        return models.make(name)
    torch.manual_seed(0)
    # Room for groups of 128.
    shape = models.HEADS | {"hidden_size": 128, "intermediate_size": 256}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()


def load(folders: dict[Path, tuple[str, ...]]) -> None:
    """Leaves what each loader's model says beside the folder."""
    # Compiling kernels takes a minute, and what they compute is the same.
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}
    arguments = [f"{folder}={','.join(routes)}" for folder, routes in folders.items()]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def dequantized(case: Case, folder: Path, scratch: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """The model that the checkpoint stands for, as an ordinary one."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    version = 1 if case.format == "gptq" else 2
    tensors = unpack.tensors_of(folder)
    state = {}
    for name, tensor in tensors.items():
        prefix, _, role = name.rpartition(".")
        if role == "qweight":
            weight = torch.from_numpy(unpack.gptq(tensors, prefix, case.bits, version=version))
            # Both loaders multiply codes by scales in float16, the scales' type.
            weight = weight.half().float()
            turned = weight.t() if case.model == "gpt2" else weight
            state[f"{prefix}.weight"] = turned.contiguous()
        elif role not in ("qzeros", "scales", "g_idx"):
            state[name] = tensor.float()
    scratch.mkdir()
    (scratch / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    save_file(state, scratch / "model.safetensors", {"format": "pt"})
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        scratch, dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded.eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:  # noqa: ANN401
    ids = torch.arange(40)[None] * 7 % model.config.vocab_size
    return model(input_ids=ids).logits.float()


@pytest.fixture(scope="module")
def loaded(
    server: Server,
    text: Path,
    tokenizer: Any,  # noqa: ANN401
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Case, Path]:
    """Every case quantized, and all of them loaded in one process."""
    root = tmp_path_factory.mktemp("gptq")
    folders = {}
    for case in CASES:
        source = root / case.model
        if not source.is_dir():
            models.save(make(case.model), tokenizer, source)
        folders[case] = root / str(case)
        status = main(
            [
                *("--server", server.address, "--model", str(source), "--calibration", str(text)),
                *("--output", str(folders[case]), "--format", case.format),
                *("--bits", str(case.bits), *case.flags),
                *("--sequences", "16", "--sequence-length", "64", "--quiet"),
            ]
        )
        assert status == 0
    load({folders[case]: case.routes for case in CASES})
    return folders


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_the_dequantized_model(
    case: Case, loaded: dict[Case, Path], tmp_path: Path
) -> None:
    folder = loaded[case]
    linears = json.loads((folder / "report.json").read_text())["linears"]
    said = load_file(f"{folder}.loaded")
    for route in case.routes:
        assert said[f"{route}.packed"] == len(linears)
        dtype = torch.float32 if route == "transformers" else torch.float16
        expected = logits_of(dequantized(case, folder, tmp_path / route, dtype))
        # The same weights to the bit; sums may be in another order.
        steps = 128 if dtype == torch.float32 else 4
        bound = steps * torch.finfo(dtype).eps * expected.abs().max()
        assert (said[route] - expected).abs().max() <= bound
    # And are not the float model's, which may be near.
    original = logits_of(make(case.model))
    assert (said["gptqmodel"] - original).norm() > 0.002 * original.norm()
