"""A folder in transformers, as its users load it; also a process that answers for one.

`python -m certiq.model.loaders.worker FOLDER REQUEST ANSWER` is for GPTQ, whose loader changes
transformers. It has GPTQModel multiply in plain torch, the one kernel of every CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from certiq.torch.experts import take_experts_apart
from certiq.torch.linears import is_linear, weight_of

LOGITS = "logits"
# How tensors of packed modules end.
PACKED = (
    *("_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"),
    *(".qweight", ".qzeros", ".scales", ".g_idx"),
)


@dataclass
class Result:
    """A loaded model and what its loader missed."""

    model: Any
    failures: tuple[str, ...]

    def weights(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Those of the linears that are there, [R, N]."""
        found = {}
        for name in names:
            try:
                module = self.model.get_submodule(name)
            except AttributeError:
                continue
            if hasattr(module, "qweight"):
                found[name] = module.dequantize_weight().t().float().contiguous()
            elif is_linear(module):
                found[name] = weight_of(module).contiguous()
        return found

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return logits_of(self.model, ids)


def load(folder: Path, *, dequantize: bool = False, gptq_bits: int | None = None) -> Result:
    """In float32 on a CPU, packed weights as the loader has them."""
    import transformers
    from transformers import AutoConfig

    options: dict[str, Any] = {}
    if dequantize:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    if gptq_bits is not None:
        # Only the backend counts; the rest is as the checkpoint says.
        options["quantization_config"] = transformers.GPTQConfig(
            bits=gptq_bits, backend="gptq_torch"
        )
    kind = _class_of(AutoConfig.from_pretrained(folder))
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", output_loading_info=True, **options
    )
    failures = []
    # What a model has no use for is carried over; packed weights that it does not use are lost.
    lost = [key for key in info["unexpected_keys"] if key.endswith(PACKED)]
    for what, keys in (dict(info) | {"unexpected_keys": lost}).items():
        if keys:
            kind, first = what.replace("_", " "), min(map(str, keys))
            failures.append(f"{folder}: transformers has {len(keys)} {kind}: {first} ...")
    quantizer = getattr(model, "hf_quantizer", None)
    if gptq_bits is None and quantizer is not None and not dequantize:
        # What the first forward would do.
        quantizer.compressor.decompress_model(model)
    if gptq_bits is None:
        # Experts are dequantized in their scales' type.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
    take_experts_apart(model)
    return Result(model.eval(), tuple(failures))


def is_known(model_type: str) -> bool:
    """transformers has code for it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of one sequence [1, T]; the last hidden states of a model without a head."""
    output = model(input_ids=ids)
    found: torch.Tensor | None = getattr(output, "logits", None)
    return (output.last_hidden_state if found is None else found).float()


def _class_of(config: Any) -> Any:
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def main(folder: Path, request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    loaded = load(folder, gptq_bits=int(config["quantization_config"]["bits"]))
    tensors = loaded.weights(asked["names"])
    if asked["ids"] is not None:
        tensors[LOGITS] = loaded.logits(torch.tensor(asked["ids"]))
    save_file(tensors, answer)
    request.with_suffix(".failures").write_text(json.dumps(loaded.failures), encoding="utf-8")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
