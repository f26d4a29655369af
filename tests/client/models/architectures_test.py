"""Many architectures of transformers through the command: what is written loads, and is what was
planned and reported; or the model is refused in one sentence."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import unpack
from architectures import ARCHITECTURES, DENSE, GPTQ, PACKED, Architecture
from certiq.model.cli import main
from programs import Server
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

RUN = [
    *("--sequences", "4", "--sequence-length", "64", "--batch-size", "2", "--quiet"),
    *("--evaluation-tokens", "256", "--evaluation-window", "64"),
]
# Weights in 4 bits, a scale a row: of random ones the error is a tenth. A weight in another's place
# is as far from it as it is large, and more.
NEAR = 0.4
# float32 both: sums are in another order at most, and what a router decides is left alone by that.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Source:
    """A model on disk, as transformers writes and loads it."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    loaded: Any
    missing: set[str]
    unexpected: set[str]


def save(architecture: Architecture, tokenizer: Any, folder: Path) -> Path:  # noqa: ANN401
    model = architecture.make()
    dtype = getattr(torch, architecture.dtype)
    model.to(dtype)
    if architecture.float32 is not None:
        kept = 0
        for module_name, module in model.named_modules():
            for of_module in (module._parameters, module._buffers):
                for name, tensor in of_module.items():
                    if tensor is not None and re.search(
                        architecture.float32, f"{module_name}.{name}"
                    ):
                        # Values that no bfloat16 has.
                        tensor.data = tensor.data.float() + 1e-4
                        kept += 1
        assert kept
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=architecture.shard_size)
    (of_characters() if architecture.characters else tokenizer).save_pretrained(folder)
    return folder


def of_characters() -> Any:  # noqa: ANN401
    """Of those that the text has; a space is written so."""
    vocabulary = {character: number for number, character in enumerate("w0123456789\u0120")}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def load(architecture: Architecture, folder: Path) -> tuple[Any, dict[str, Any]]:
    kind = getattr(transformers, architecture.kind)
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    try:
        model, info = kind.from_pretrained(folder, **options)
    except AttributeError as error:
        # Some classes initialize the weight of a linear that has a packed one in its place.
        if "'weight'" not in str(error):
            raise
        unpacked = transformers.CompressedTensorsConfig(dequantize=True)
        model, info = kind.from_pretrained(folder, quantization_config=unpacked, **options)
    assert not info["mismatched_keys"]
    # Packed experts come in the checkpoint's type.
    return torch.nn.Module.float(model).eval(), info


@pytest.fixture(scope="module")
def sources(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: ANN401
    """Models by their names, saved and loaded once for both formats; the latest is kept."""
    root = tmp_path_factory.mktemp("architectures")
    made: dict[str, Source] = {}

    def source(name: str) -> Source:
        if name not in made:
            made.clear()
            folder = save(ARCHITECTURES[name], tokenizer, root / name)
            loaded, info = load(ARCHITECTURES[name], folder)
            made[name] = Source(
                folder,
                unpack.tensors_of(folder),
                loaded,
                set(info["missing_keys"]),
                set(info["unexpected_keys"]),
            )
        return made[name]

    return source


@torch.no_grad()
def output_of(model: Any, ids: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    output = model(input_ids=ids)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).float()


def windows(folder: Path, text: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:256]).reshape(-1, 64)


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return math.exp(loss.item())


def dequantized(format: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output's quantized weights by the names that they have as float ones."""
    found = {}
    for name in tensors:
        prefix, _, role = name.rpartition(".")
        if format == PACKED and role == "weight_packed":
            found[f"{prefix}.weight"] = torch.from_numpy(unpack.compressed(tensors, prefix, 4))
        elif format == GPTQ and role == "qweight":
            weight = torch.from_numpy(unpack.gptq(tensors, prefix, 4, version=1))
            found[f"{prefix}.weight"] = weight.t().contiguous()
    return found


def together(name: str, before: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor of all experts [experts, ...] from those of each, which are taken away."""
    parent, _, last = name.rpartition(".")
    parts = ["gate_proj", "up_proj"] if last == "gate_up_proj" else [last]
    experts = [
        torch.cat([weights.pop(f"{parent}.{expert}.{part}.weight") for part in parts])
        for expert in range(len(before))
    ]
    fused = torch.stack(experts)
    return fused if fused.shape == before.shape else fused.transpose(1, 2).contiguous()


def is_told(tensor: str, told: set[str]) -> bool:
    """Whether the plan speaks of a tensor, or of an expert in it."""
    module = tensor.removesuffix(".weight")
    # DBRX's experts are the module around the one that has their weights.
    parent = re.escape(module.rpartition(".")[0].removesuffix(".mlp"))
    expert = re.compile(rf"({re.escape(module)}|{parent}|{parent}\.experts)\.\d+(\.|$)")
    return module in told or any(expert.match(name) for name in told)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the byte."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
    )


PACKED_ROLES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)

CASES = [
    pytest.param(name, format, id=f"{name}-{format}", marks=[] if own.quick else [pytest.mark.slow])
    for name, own in ARCHITECTURES.items()
    for format in own.formats
]
REFUSED = [
    pytest.param(name, marks=[] if own.quick else [pytest.mark.slow])
    for name, own in ARCHITECTURES.items()
    if own.refused is not None
]


@pytest.mark.parametrize("name", REFUSED)
def test_architecture_is_refused_in_a_sentence(
    name: str,
    server: Server,
    text: Path,
    tokenizer: Any,  # noqa: ANN401
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    architecture = ARCHITECTURES[name]
    assert architecture.refused is not None
    source = save(architecture, tokenizer, tmp_path / "source")
    output = tmp_path / "output"
    status = main(
        [
            *("--model", str(source), "--calibration", str(text), "--output", str(output)),
            *("--server", server.address, *RUN, *architecture.flags),
        ]
    )
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("certiq-")]
    assert status == 2
    assert len(said) == 1
    assert architecture.refused in said[0]
    # Nothing that a loader would take for a model.
    assert not list(output.glob("*.safetensors"))


@pytest.mark.parametrize(("name", "format"), CASES)
def test_architecture(
    name: str,
    format: str,
    server: Server,
    text: Path,
    tmp_path: Path,
    sources: Any,  # noqa: ANN401
    capsys: pytest.CaptureFixture[str],
) -> None:
    architecture = ARCHITECTURES[name]
    source: Source = sources(name)
    output = tmp_path / "output"
    ids = windows(source.folder, text)
    expected = output_of(source.loaded, ids)
    width = source.loaded.config.get_text_config().hidden_size
    # A masked language model predicts no next token, and its evaluation is refused.
    predicts = expected.shape[-1] != width and not architecture.kind.endswith("MaskedLM")
    status = main(
        [
            *("--model", str(source.folder), "--calibration", str(text), "--output", str(output)),
            *("--server", server.address, "--format", format, *RUN, *architecture.flags),
            *(["--evaluation", str(text)] if predicts else []),
        ]
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    report = json.loads((output / "report.json").read_text())
    tensors = unpack.tensors_of(output)
    weights = dequantized(format, tensors)
    if format == DENSE:
        assert tensors.keys() == source.tensors.keys()
        weights = {
            own: tensor for own, tensor in tensors.items() if not equal(tensor, source.tensors[own])
        }

    # What was not quantized is as it was, and what was is near.
    made: set[str] = set()
    taken = {
        own.rpartition(".")[0] for own in tensors if own.endswith((".weight_packed", ".qweight"))
    }
    for own, tensor in tensors.items():
        prefix, _, role = own.rpartition(".")
        if own in weights or (prefix in taken and role in PACKED_ROLES):
            continue
        if own in source.tensors:
            assert equal(tensor, source.tensors[own]), own
        else:
            # transformers puts it together from several.
            assert equal(tensor, source.loaded.state_dict()[own].to(tensor.dtype)), own
            made.add(own)
    for own, weight in weights.items():
        if own in source.tensors:
            before = source.tensors[own].float()
            distance = ((weight - before).norm() / before.norm()).item()
            assert 0 < distance < NEAR, (own, distance)
    # Experts of one tensor, which are packed one by one.
    gone = source.tensors.keys() - tensors.keys() - weights.keys()
    for own in gone:
        if not made:
            weights[own] = together(own, source.tensors[own], weights)

    # The plan is what happened.
    planned = report["plan"]
    for own in planned["stay_float"]:
        stored = own if own in tensors else f"{own}.weight"
        if stored in source.tensors and stored in tensors:
            assert stored not in weights, own
            assert equal(tensors[stored], source.tensors[stored])
        assert own not in taken
    size = sum(
        tensor.nbytes
        for own, tensor in tensors.items()
        if own in weights or (own.rpartition(".")[0] in taken and own.rpartition(".")[2] != "bias")
    )
    assert size == planned["predicted_bytes"]
    assert sum(item["weights"] for item in report["linears"]) == sum(
        weight.numel() for weight in weights.values()
    )
    told = set(planned["stay_float"])
    silent = [
        own
        for own, tensor in source.tensors.items()
        if tensor.dim() >= 2
        and re.search(r"\.\d+\.", own)
        and own not in weights
        and not is_told(own, told)
        # No matrices that are multiplied with (fused experts' biases are two-dimensional), or no
        # parameters (MiniMax's decays).
        and not re.search(r"conv|embed|norm|vis|decay|slope|post_layernorm|bias$", own)
    ]
    assert not silent, silent

    # It loads, as the float model with these weights.
    loaded, info = load(architecture, output) if format != GPTQ else (None, None)
    plain = tmp_path / "plain"
    plain.mkdir()
    config = json.loads((output / "config.json").read_text())
    config.pop("quantization_config", None)
    (plain / "config.json").write_text(json.dumps(config))
    state = {
        own: tensor for own, tensor in tensors.items() if own in source.tensors or own in made
    } | weights
    save_file(
        {own: t.contiguous() for own, t in state.items()},
        plain / "model.safetensors",
        {"format": "pt"},
    )
    model, plain_info = load(architecture, plain)
    assert set(plain_info["missing_keys"]) == source.missing
    assert set(plain_info["unexpected_keys"]) == source.unexpected
    put = output_of(model, ids)
    bound = TOLERANCE * put.abs().max().item()
    assert (put - expected).abs().max() > 10 * bound
    if loaded is not None:
        assert set(info["missing_keys"]) == source.missing
        assert set(info["unexpected_keys"]) == source.unexpected
        found = output_of(loaded, ids)
        if format == PACKED and architecture.dtype != "float32":
            # The loader may round products of codes and scales to the checkpoint's type.
            step = torch.finfo(getattr(torch, architecture.dtype)).eps
            bound = 8 * step * put.abs().max().item()
        assert (found - put).abs().max() <= bound
    if predicts:
        assert report["perplexity"]["float"] == pytest.approx(
            perplexity(expected, ids), rel=TOLERANCE
        )
        assert report["perplexity"]["quantized"] == pytest.approx(
            perplexity(put, ids), rel=TOLERANCE
        )
