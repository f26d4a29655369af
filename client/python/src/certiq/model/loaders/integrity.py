"""Rules of every loader: a checkpoint whose parts are all there and agree with each other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from certiq.model.loaders.checkpoint import Checkpoint, Module, in_block
from certiq.model.loaders.files import FLOATS, TensorHead
from certiq.model.loaders.findings import Finding, error, warning
from certiq.model.loaders.schemes import is_table

# Any of these is a vocabulary that a tokenizer is made from.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json", "tiktoken.model", "spm.model", "source.spm"),
)
# What shows that a tensor is a weight: a buffer may be infinite, as a mask is.
WEIGHTS = (".weight", ".bias", ".weight_scale", ".scales", "_proj", "_proj_bias")
# Stacks whose members are numbered without gaps.
_MEMBER = re.compile(r"^(?P<stack>.*?\b(?:layers|h|blocks|block|layer|experts))\.(?P<index>\d+)\.")

Rule = Callable[[Checkpoint], Iterator[Finding]]


def check(checkpoint: Checkpoint) -> Iterator[Finding]:
    yield from checkpoint.findings
    for rule in RULES:
        yield from rule(checkpoint)


def config_names_its_model(checkpoint: Checkpoint) -> Iterator[Finding]:
    for key in ("model_type", "architectures"):
        if not checkpoint.config.get(key):
            yield error("config.json", f"{key}: expected the model's, found none")


def json_files_parse(checkpoint: Checkpoint) -> Iterator[Finding]:
    for path in sorted(checkpoint.folder.glob("*.json")):
        if path.name in ("config.json", "model.safetensors.index.json"):
            continue  # Read already.
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as cause:
            yield error(path.name, f"expected JSON: {cause}")


def promised_files_exist(checkpoint: Checkpoint) -> Iterator[Finding]:
    folder = checkpoint.folder
    for name in ("config.json", "tokenizer_config.json"):
        own = _object(checkpoint, name).get("auto_map") or {}
        # A class, or several: a tokenizer's slow one and its fast one.
        classes = list(own.values()) if isinstance(own, dict) else [own]
        for kind in classes:
            for reference in kind if isinstance(kind, list) else [kind]:
                if reference is None:
                    continue
                if not isinstance(reference, str):
                    yield error(name, f"auto_map: expected names of classes, got {own!r}")
                    continue
                if "--" in reference:
                    yield warning(name, f"auto_map: the code of {reference} is not in this folder")
                    continue
                module = reference.split(".")[0]
                if not (folder / f"{module}.py").is_file():
                    yield error(name, f"auto_map promises {module}.py, which is not there")
    present = [name for name in VOCABULARIES if (folder / name).is_file()]
    if (folder / "tokenizer_config.json").is_file():
        # Tokenizers of bytes (ByT5, and those with code of their own) have no vocabulary.
        own = _object(checkpoint, "tokenizer_config.json")
        kind = str(own.get("tokenizer_class") or "")
        if not present and not own.get("auto_map") and not kind.startswith(("ByT5", "Canine")):
            yield error("tokenizer_config.json", f"expected one of {', '.join(VOCABULARIES)} too")
    elif not present:
        yield warning(".", "there is no tokenizer")


def blocks_are_complete(checkpoint: Checkpoint) -> Iterator[Finding]:
    members: dict[str, set[int]] = {}
    for head in checkpoint.tensors:
        # Experts are a stack within a block, so every prefix counts.
        for stack, index in _stacks(head.name):
            members.setdefault(stack, set()).add(index)
    for stack, found in members.items():
        lost = sorted(set(range(max(found))) - found)
        if lost:
            yield error(f"{stack}.{lost[0]}", f"has no tensors, though {stack}.{max(found)} has")
    text = checkpoint.text_config
    count = next(
        (text[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in text), None
    )
    stacks = {name: found for name, found in members.items() if not name.endswith("experts")}
    # Some models go through the same blocks several times, so this is no more than a hint.
    if (
        isinstance(count, int)
        and stacks
        and all(max(found) + 1 < count for found in stacks.values())
    ):
        name, found = max(stacks.items(), key=lambda item: max(item[1]))
        yield warning(
            name, f"config.json promises {count} blocks, the tensors have {max(found) + 1}"
        )


def packed_modules_are_whole(checkpoint: Checkpoint) -> Iterator[Finding]:
    for module in checkpoint.modules.values():
        if module.scheme is None:
            yield error(
                module.name,
                "has packed tensors, and quantization_config tells that it is float",
            )
            continue
        lacking = [role for role in _required(checkpoint, module) if role not in module.parts]
        if lacking:
            yield error(
                module.name,
                f"expected {', '.join(_required(checkpoint, module))}, lacks {', '.join(lacking)}",
            )
            continue
        yield from _shapes(checkpoint, module)


def float_and_packed_at_once(checkpoint: Checkpoint) -> Iterator[Finding]:
    for name in checkpoint.modules:
        if f"{name}.weight" in checkpoint.tensors:
            yield error(name, "has both a float weight and packed tensors: expected either")


def packed_head_is_untied(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Loaders take a tied head from the embeddings and leave its own tensors."""
    if checkpoint.config.get("tie_word_embeddings") or checkpoint.text_config.get(
        "tie_word_embeddings"
    ):
        for name in checkpoint.modules:
            if _last(name) == "lm_head":
                yield error(
                    name, "is packed: expected tie_word_embeddings false in config.json, got true"
                )


def packed_only_with_a_config(checkpoint: Checkpoint) -> Iterator[Finding]:
    if checkpoint.quantization is not None or not checkpoint.understood:
        return
    for head in checkpoint.tensors:
        if head.name.endswith((".qweight", ".weight_packed")):
            yield error(head.name, "is packed, and config.json has no quantization_config")
            return


def floats_are_told(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Loaders make every linear packed that they are not told to leave."""
    if checkpoint.quantization is None:
        return
    kinds = {_last(name) for name in checkpoint.modules}
    for name in checkpoint.float_weights:
        if not in_block(name) or name in checkpoint.modules or is_table(name):
            continue
        if checkpoint.quantization.scheme_of(name) is None:
            continue
        if _last(name) in kinds:
            yield error(
                name,
                "is float and quantization_config does not tell so: loaders look for packed "
                "tensors",
            )
        else:
            yield warning(
                name,
                "is float and quantization_config does not tell so: a loader for which it is a "
                "linear looks for packed tensors",
            )


def told_modules_are_packed(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Names that the configuration has in full have tensors."""
    told: list[str] = []
    if checkpoint.compressed is not None:
        ignored = set(checkpoint.compressed.ignore)
        for targets, _ in checkpoint.compressed.groups:
            told += [
                t for t in targets if "." in t and not t.startswith("re:") and t not in ignored
            ]
    if checkpoint.gptq is not None:
        # A name without a block's number is one of every block.
        listed = checkpoint.gptq.packed_in_blocks or []
        told += [name for name in listed if in_block(name) and not checkpoint.gptq.excluded(name)]
    for name in told:
        if name not in checkpoint.modules:
            yield error(name, "quantization_config tells that it is packed: it has no such tensors")
    if checkpoint.quantization is not None and not checkpoint.modules:
        yield error("config.json", "has a quantization_config, and no tensor is packed")


def scales_are_sound(checkpoint: Checkpoint) -> Iterator[Finding]:
    for module in checkpoint.modules.values():
        head = module.parts.get("weight_scale") or module.parts.get("scales")
        if head is None or head.dtype not in FLOATS or module.scheme is None:
            continue
        values = checkpoint.tensors.read(head.name).astype(np.float64)
        if not bool(np.isfinite(values).all()):
            yield error(head.name, _place(values, ~np.isfinite(values), "finite scales"))
        elif bool((values == 0).any()):
            yield error(head.name, _place(values, values == 0, "scales beside zero"))
        elif not module.scheme.symmetric and bool((values < 0).any()):
            # A symmetric grid may be turned over by a negative scale.
            yield error(head.name, _place(values, values < 0, "positive scales with zero points"))


def scales_have_the_models_type(checkpoint: Checkpoint) -> Iterator[Finding]:
    """compressed-tensors computes in the type of the model, to which scales would be rounded."""
    dtype = checkpoint.dtype
    if checkpoint.compressed is None or dtype is None:
        return
    for module in checkpoint.modules.values():
        head = module.parts.get("weight_scale")
        if head is not None and FLOATS.get(head.dtype, dtype) != dtype:
            yield error(
                head.name, f"expected config.json's dtype {dtype}, got {FLOATS[head.dtype]}"
            )


def weights_are_finite(checkpoint: Checkpoint) -> Iterator[Finding]:
    for head in checkpoint.tensors:
        # Scales of packed modules have a rule of their own.
        if head.dtype not in FLOATS or not head.name.endswith(WEIGHTS) or _is_scale(head):
            continue
        row = 0
        for piece in checkpoint.tensors.pieces(head.name):
            bad = _not_finite(piece)
            if bool(bad.any()):
                yield error(head.name, _place(piece, bad, "finite values", row))
                break
            row += len(piece) if piece.ndim else 0


def group_order_is_told(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Where desc_act is false, loaders take groups for those of neighbouring columns."""
    quantization = checkpoint.gptq
    for name, index in checkpoint.group_indices():
        module = checkpoint.modules[name]
        scheme = module.scheme
        if scheme is None or not len(index):
            continue
        size = scheme.group_size or len(index)
        groups = -(-len(index) // size)
        if int(index.min()) < 0 or int(index.max()) >= groups:
            yield error(
                f"{name}.g_idx",
                f"expected groups 0 ... {groups - 1}, got {index.min()} ... {index.max()}",
            )
        elif (
            quantization is not None
            and not quantization.desc_act
            and not np.array_equal(index, np.arange(len(index)) // size)
        ):
            yield error(
                f"{name}.g_idx",
                "has groups in another order than the columns': expected desc_act true in "
                "quantization_config, got false",
            )


def quantize_config_agrees(checkpoint: Checkpoint) -> Iterator[Finding]:
    """GPTQModel's own file says the same as config.json."""
    if checkpoint.gptq is None or not (checkpoint.folder / "quantize_config.json").is_file():
        return
    other = _object(checkpoint, "quantize_config.json")
    own = checkpoint.gptq.config
    for key in ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "dynamic"):
        if other.get(key) != own.get(key):
            yield error(
                "quantize_config.json",
                f"{key}: expected {own.get(key)!r} as in config.json, got {other.get(key)!r}",
            )


RULES: tuple[Rule, ...] = (
    config_names_its_model,
    json_files_parse,
    promised_files_exist,
    blocks_are_complete,
    packed_modules_are_whole,
    float_and_packed_at_once,
    packed_head_is_untied,
    packed_only_with_a_config,
    floats_are_told,
    told_modules_are_packed,
    scales_are_sound,
    scales_have_the_models_type,
    weights_are_finite,
    group_order_is_told,
    quantize_config_agrees,
)


def _required(checkpoint: Checkpoint, module: Module) -> list[str]:
    if checkpoint.gptq is not None:
        return ["qweight", "qzeros", "scales", "g_idx"]
    assert module.scheme is not None
    zeros = [] if module.scheme.symmetric else ["weight_zero_point"]
    return ["weight_packed", "weight_scale", "weight_shape", *zeros]


def _shapes(checkpoint: Checkpoint, module: Module) -> Iterator[Finding]:
    scheme, rows, features = module.scheme, module.rows, module.features
    assert scheme is not None
    if rows is None or features is None or rows < 1 or features < 1:
        yield error(
            module.name,
            f"expected tensors that tell rows and features, got "
            f"{', '.join(f'{role} {head.described}' for role, head in module.parts.items())}",
        )
        return
    compressed = checkpoint.compressed is not None
    groups = 1
    if scheme.group_size:
        groups = -(-features // scheme.group_size)
        if compressed and features % scheme.group_size:
            yield error(
                module.name,
                f"expected features that groups of {scheme.group_size} divide, got {features}",
            )
            return
    words = _words(features, scheme.bits)
    floats, integers = tuple(FLOATS), ("I32",)
    if compressed:
        expected = {
            "weight_packed": (integers, (rows, words)),
            "weight_scale": (floats, (rows, groups)),
            "weight_shape": (("I64", "I32"), (2,)),
            "weight_g_idx": (("I32", "I64"), (features,)),
        }
        if not scheme.symmetric:
            expected["weight_zero_point"] = (integers, (_words(rows, scheme.bits), groups))
        elif "weight_zero_point" in module.parts:
            yield error(
                module.name,
                "has weight_zero_point, and quantization_config tells a symmetric grid",
            )
    else:
        expected = {
            "qweight": (integers, (words, rows)),
            "qzeros": (integers, (groups, _words(rows, scheme.bits))),
            "scales": (floats, (groups, rows)),
            "g_idx": (("I32", "I64"), (features,)),
        }
    for role, (dtypes, shape) in expected.items():
        head = module.parts.get(role)
        if head is not None and (head.dtype not in dtypes or head.shape != shape):
            yield error(
                head.name,
                f"expected {' or '.join(dtypes)} {list(shape)} of {rows} rows and {features} "
                f"features with {scheme}, got {head.described}",
            )


def _words(count: int, bits: int) -> int:
    """32-bit words of a stream of codes."""
    return -(-count * bits // 32)


def _stacks(name: str) -> Iterator[tuple[str, int]]:
    begin = 0
    while (found := _MEMBER.match(name[begin:])) is not None:
        # Members of a Sequential have a weight and no modules; an activation among them has none.
        if "." not in name[begin + found.end() :]:
            return
        yield name[:begin] + found["stack"], int(found["index"])
        begin += found.end()


def _object(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    if name == "config.json":
        return checkpoint.config
    try:
        content = json.loads((checkpoint.folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # What does not parse is another rule's finding.
    return content if isinstance(content, dict) else {}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_scale(head: TensorHead) -> bool:
    return head.name.endswith((".weight_scale", ".scales"))


def _not_finite(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if values.dtype.name == "bfloat16":
        # Ten times as fast as numpy's isfinite, which counts where an embedding is 2 GB.
        return (values.view(np.uint16) & 0x7F80) == 0x7F80
    return ~np.isfinite(values)


def _place(
    values: np.ndarray[Any, Any], bad: np.ndarray[Any, Any], expected: str, row: int = 0
) -> str:
    """The first bad value and where it is."""
    place = [int(side) for side in np.argwhere(bad)[0]]
    value = float(values[tuple(place)])
    if place:
        place[0] += row
    return f"expected {expected}, got {value} at {place} ({int(bad.sum())} in all)"
