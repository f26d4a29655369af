"""What a checkpoint's configuration says of each module: packed, and how, or left float."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COMPRESSED = "compressed_tensors"
GPTQ = ("gptq", "gptq_v2")

# Modules with two-dimensional weights that are no linears, by the last word of their names.
_TABLES = re.compile(
    r"(^|\.)(embed_tokens(_per_layer)?|embed_positions|embed_in|wte|wpe|tok_embeddings"
    r"|(word|position|token_type)_embeddings|relative_attention_bias)$"
)


@dataclass(frozen=True)
class Scheme:
    """How one module's weights are packed."""

    bits: int
    group_size: int
    """0: one scale a row."""
    symmetric: bool

    def __str__(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "a scale a row"
        return f"{self.bits} bits, {'symmetric' if self.symmetric else 'asymmetric'}, {groups}"


class ConfigError(Exception):
    """The quantization_config has not the fields that its method needs."""


class Quantization:
    """A config's quantization_config."""

    method: str
    format: str

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def scheme_of(self, module: str) -> Scheme | None:
        """None: the module is told to be float."""
        raise NotImplementedError


class CompressedTensors(Quantization):
    """quant_method compressed-tensors, format pack-quantized."""

    method = "compressed-tensors"
    format = COMPRESSED

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ConfigError(f"config_groups: expected one group or more, got {groups!r}")
        self.ignore = _targets("ignore", config.get("ignore") or [])
        self.groups: list[tuple[list[str], Scheme]] = []
        for name, group in groups.items():
            try:
                self._add(group)
            except (KeyError, TypeError, ValueError, AttributeError) as cause:
                raise ConfigError(
                    f"config_groups.{name}: expected targets, and weights with num_bits, strategy "
                    f"and symmetric, got {group!r}"
                ) from cause

    def _add(self, group: Mapping[str, Any]) -> None:
        weights = group["weights"]
        strategy = weights["strategy"]
        if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
            raise ValueError
        size = int(weights["group_size"]) if strategy == "group" else 0
        bits = int(weights["num_bits"])
        if not 2 <= bits <= 8 or size < 0:
            raise ValueError
        targets = _targets("targets", group["targets"])
        self.groups.append((targets, Scheme(bits, size, bool(weights.get("symmetric", True)))))

    def scheme_of(self, module: str) -> Scheme | None:
        if any(_names(target, module) for target in self.ignore):
            return None
        found = self.group_of(module)
        return None if found is None else self.groups[found][1]

    def group_of(self, module: str) -> int | None:
        """As compressed-tensors matches: names before expressions before classes."""
        for kind in (_is_name, _is_expression, _is_class):
            for index, (targets, _) in enumerate(self.groups):
                if any(kind(target, module) for target in targets):
                    return index
        return None


class Gptq(Quantization):
    """quant_method gptq, in either checkpoint_format."""

    method = "gptq"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        # GPTQModel's older name of the same field stands behind.
        self.format = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        if self.format not in GPTQ:
            raise ConfigError(f"checkpoint_format: expected gptq or gptq_v2, got {self.format}")
        try:
            self.base = self._scheme(config)
        except (KeyError, TypeError, ValueError) as cause:
            raise ConfigError(
                "expected whole numbers bits and group_size, and sym, got "
                f"{ ({key: config.get(key) for key in ('bits', 'group_size', 'sym')}) }"
            ) from cause
        self.desc_act = bool(config.get("desc_act", False))
        self.dynamic: dict[str, Any] = config.get("dynamic") or {}
        try:
            for expression, values in self.dynamic.items():
                re.compile(_pattern(expression))
                self._scheme({**config, **values})
        except (AttributeError, TypeError, ValueError, re.error) as cause:
            raise ConfigError(
                f"dynamic: expected regular expressions with objects, got {self.dynamic!r}"
            ) from cause
        # What transformers takes for packed; None: every linear of a block.
        listed = config.get("modules_in_block_to_quantize")
        self.packed_in_blocks: list[str] | None = None
        if listed:
            if not isinstance(listed, list):
                raise ConfigError(f"modules_in_block_to_quantize: expected a list, got {listed!r}")
            parts = [part if isinstance(part, list) else [part] for part in listed]
            self.packed_in_blocks = [str(name) for part in parts for name in part]

    def _scheme(self, config: Mapping[str, Any]) -> Scheme:
        size = int(config["group_size"])
        return Scheme(int(config["bits"]), max(size, 0), bool(config.get("sym", True)))

    def scheme_of(self, module: str) -> Scheme | None:
        return self.scheme_by_dynamic(module) if self.listed(module) else None

    def scheme_by_dynamic(self, module: str) -> Scheme | None:
        """Without transformers' list."""
        rule = self._rule(module)
        if rule is None:
            return self.base
        return None if rule[0] else self._scheme({**self.config, **rule[1]})

    def excluded(self, module: str) -> bool:
        """GPTQModel's: the first expression of `dynamic` that matches leaves it float."""
        rule = self._rule(module)
        return rule is not None and rule[0]

    def _rule(self, module: str) -> tuple[bool, dict[str, Any]] | None:
        for expression, values in self.dynamic.items():
            if re.match(_pattern(expression), module):
                return expression.startswith("-:"), dict(values)
        return None

    def listed(self, module: str) -> bool:
        """transformers': all linears of blocks, or those with these endings."""
        names = self.packed_in_blocks
        return names is None or any(module.endswith(name) for name in names)


def read(config: Mapping[str, Any]) -> Quantization | None:
    """The folder's quantization; None for an ordinary checkpoint. ConfigError where it is no
    quantization that certiq writes."""
    own = config.get("quantization_config")
    if own is None:
        return None
    if not isinstance(own, dict):
        raise ConfigError(f"expected an object, got {own!r}")
    method = own.get("quant_method")
    if method == "gptq":
        return Gptq(own)
    if method == "compressed-tensors" and own.get("format") == "pack-quantized":
        return CompressedTensors(own)
    raise ConfigError(
        "expected quant_method gptq, or compressed-tensors with the format pack-quantized, got "
        f"{method} {own.get('format') or ''}".rstrip()
    )


def is_table(module: str) -> bool:
    """By its name an embedding, which is no linear though its weight has two dimensions."""
    return _TABLES.search(module) is not None


def _targets(field: str, given: object) -> list[str]:
    try:
        if not isinstance(given, list):
            raise TypeError
        for target in given:
            if target.startswith("re:"):
                re.compile(target[3:])
    except (AttributeError, TypeError, re.error) as cause:
        raise ConfigError(
            f"{field}: expected a list of names and regular expressions, got {given!r}"
        ) from cause
    return given


def _pattern(expression: str) -> str:
    """Of a rule of `dynamic`."""
    return expression.removeprefix("-:").removeprefix("+:")


def _names(target: str, module: str) -> bool:
    return _is_name(target, module) or _is_expression(target, module)


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_expression(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def _is_class(target: str, module: str) -> bool:
    return (target == "Linear" and not is_table(module)) or (
        target == "Embedding" and is_table(module)
    )
