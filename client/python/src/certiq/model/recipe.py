"""Which module gets which spec: a YAML file, or flags, which are its shorthand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from certiq.errors import Error
from certiq.model.errors import UsageError
from certiq.model.settings import DENSE, PACKED
from certiq.spec import (
    GroupScalesName,
    MethodName,
    OnFailureName,
    OrderName,
    QualityName,
    RoundingName,
    ScaleName,
    ScaleObjectiveName,
    Spec,
)

VERSION = 1

# A setting is one of a few words, a whole number from a lowest to a highest (None: the server's to
# judge), true or false, or a damping rule.
_CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(MethodName),
    "group_scales": get_args(GroupScalesName),
    "scale": get_args(ScaleName),
    "scale_objective": get_args(ScaleObjectiveName),
    "rounding": get_args(RoundingName),
    "order": get_args(OrderName),
    "on_failure": get_args(OnFailureName),
    "format": PACKED + DENSE,
    "quality": get_args(QualityName),
}
_RANGES: dict[str, tuple[int, int | None]] = {
    "bits": (2, 8),
    "group_size": (0, None),
    "scale_passes": (0, None),
    "scale_trials": (0, None),
    "polish": (0, None),
    "seed": (0, 2**64 - 1),
}
_SWITCHES = ("symmetric", "signed_scales")

# In the order in which recipes are written. What is missing of Spec's fields (grid, scale_dtype,
# the report's) follows from the checkpoint, or is the driver's to choose.
SETTINGS = (
    *("method", "bits", "symmetric", "group_size", "format", "quality"),
    *("group_scales", "scale", "scale_objective", "scale_passes", "scale_trials", "signed_scales"),
    *("polish", "rounding", "seed", "order", "damping", "on_failure"),
)

_HEADER = "# certiq-quantize-model --recipe reads this; null is left to the server's defaults.\n"


@dataclass(frozen=True)
class Rule:
    """What the modules that one of `match` finds in their names differ in from earlier rules."""

    match: tuple[str, ...]
    # True: they stay float; False: they do not, whatever earlier rules say.
    ignore: bool | None = None
    # Fields of Spec; None is a value, too: back to the server's default.
    settings: tuple[tuple[str, Any], ...] = ()
    # For messages: the file and the rule's number, or the flag.
    origin: str = field(default="", compare=False)

    def matches(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.match)


@dataclass(frozen=True)
class Recipe:
    """Names are those of modules in the checkpoint, model.layers.3.mlp.experts.7.w1 for example."""

    default: Spec
    rules: tuple[Rule, ...] = ()

    @classmethod
    def of_flags(cls, spec: Spec, ignore: Sequence[str] = ()) -> Recipe:
        """One spec for all that no pattern of `ignore` finds."""
        return cls(spec, _ignoring(ignore))

    @classmethod
    def read(cls, path: Path, spec: Spec, ignore: Sequence[str] = ()) -> Recipe:
        """The file's `default` over `spec`, its rules, then those of `ignore`.

        A flag that was given cannot be told from a flag's default, so the file wins where it
        says something, and `spec` fills what it leaves out.
        """
        content = _load(path)
        default = replace(spec, **_default(path, content))
        return cls(default, (*_rules(path, content), *_ignoring(ignore)))

    def spec_of(self, name: str) -> Spec | None:
        """None: the module stays float."""
        settings: dict[str, Any] = {}
        ignored = False
        for rule in self._matching(name):
            settings |= dict(rule.settings)
            if rule.ignore is not None:
                ignored = rule.ignore
        return None if ignored else replace(self.default, **settings)

    def chosen(self, name: str) -> bool:
        """True where a rule, not only the default, asks for a spec for this module."""
        rules = self._matching(name)
        return self.spec_of(name) is not None and any(
            rule.settings or rule.ignore is False for rule in rules
        )

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """A sentence for each rule that finds no module, as a misspelt one does."""
        every = list(names)
        return [
            f"{rule.origin} matches none of the {len(every)} modules ({_listed(rule.match)})"
            for rule in self.rules
            if not any(rule.matches(name) for name in every)
        ]

    def resolved(self) -> str:
        """YAML that `read` reads back to an equal recipe, whatever the flags are then."""
        content = {
            "version": VERSION,
            "default": {name: getattr(self.default, name) for name in SETTINGS},
            "rules": [_written(rule) for rule in self.rules],
        }
        return _HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)

    def _matching(self, name: str) -> list[Rule]:
        return [rule for rule in self.rules if rule.matches(name)]


def _ignoring(patterns: Sequence[str]) -> tuple[Rule, ...]:
    return tuple(
        Rule((_pattern("--ignore", pattern),), ignore=True, origin="--ignore")
        for pattern in patterns
    )


def _written(rule: Rule) -> dict[str, Any]:
    match: str | list[str] = rule.match[0] if len(rule.match) == 1 else list(rule.match)
    ignore = {} if rule.ignore is None else {"ignore": rule.ignore}
    return {"match": match, **ignore, **dict(rule.settings)}


def _listed(patterns: Sequence[str]) -> str:
    return ", ".join(repr(pattern) for pattern in patterns)


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected UTF-8, got another encoding: {error}") from error
    try:
        _check_duplicates(path, yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML's messages are of several lines; ValueError comes of dates such as 2026-13-01.
        words = " ".join(str(error).split())
        raise UsageError(f"{path}: expected YAML, got what PyYAML refuses: {words}") from error
    mapping = _mapping(f"{path}", content)
    _check_keys(f"{path}", mapping, ("version", "default", "rules"))
    if "version" not in mapping:
        raise UsageError(f"{path}: expected version: {VERSION}, got no version")
    version = mapping["version"]
    if version != VERSION or isinstance(version, bool) or not isinstance(version, int):
        raise UsageError(f"{path}: version: expected {VERSION}, got {version!r}")
    return mapping


def _check_duplicates(path: Path, node: yaml.Node | None) -> None:
    """YAML forbids a key that stands twice, which PyYAML takes the last of."""
    _check_keys_once(f"{path}", node)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.value == "default":
            _check_keys_once(f"{path}: default", value)
        elif key.value == "rules" and isinstance(value, yaml.SequenceNode):
            for number, rule in enumerate(value.value, 1):
                _check_keys_once(f"{path}: rule {number}", rule)


def _check_keys_once(where: str, node: yaml.Node | None) -> None:
    seen: set[str] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in seen:
            raise UsageError(
                f"{where}: {key.value}: expected each key once, got it again in line "
                f"{key.start_mark.line + 1}"
            )
        seen.add(key.value)


def _default(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    where = f"{path}: default"
    default = _mapping(where, _given(content, "default", {}))
    _check_keys(where, default, SETTINGS)
    return dict(_settings(where, default))


def _given(content: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    """A key with nothing after it is as good as none."""
    return otherwise if content.get(key) is None else content[key]


def _rules(path: Path, content: Mapping[str, Any]) -> list[Rule]:
    rules = _given(content, "rules", [])
    if not isinstance(rules, list):
        raise UsageError(f"{path}: rules: expected a list of mappings, got {_kind(rules)}")
    return [_rule(f"{path}: rule {number}", rule) for number, rule in enumerate(rules, 1)]


def _rule(where: str, content: object) -> Rule:
    rule = _mapping(where, content)
    if "format" in rule:
        raise UsageError(
            f"{where}: format: expected it in default only, as a checkpoint has one format, got "
            f"{rule['format']!r}"
        )
    allowed = tuple(name for name in SETTINGS if name != "format")
    _check_keys(where, rule, ("match", "ignore", *allowed))
    if "match" not in rule:
        raise UsageError(f"{where}: match: expected a regular expression or a list, got none")
    match = rule["match"] if isinstance(rule["match"], list) else [rule["match"]]
    if not match:
        raise UsageError(f"{where}: match: expected a regular expression or a list, got no items")
    patterns = tuple(_pattern(f"{where}: match", pattern) for pattern in match)
    ignore = rule.get("ignore")
    if "ignore" in rule and not isinstance(ignore, bool):
        raise UsageError(f"{where}: ignore: expected true or false, got {ignore!r}")
    settings = _settings(where, rule)
    if ignore and settings:
        raise UsageError(
            f"{where}: ignore: expected true alone or false, got true beside {settings[0][0]}, "
            "which a module that stays float has no use for"
        )
    if ignore is None and not settings:
        raise UsageError(
            f"{where}: expected ignore or a setting such as bits, got nothing beside match"
        )
    return Rule(patterns, ignore, settings, where)


def _settings(where: str, content: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """In the order of SETTINGS, so that equal rules are equal however they were written."""
    return tuple(
        (name, _value(f"{where}: {name}", name, content[name]))
        for name in SETTINGS
        if name in content
    )


def _value(where: str, name: str, value: object) -> object:
    if value is None:
        return None
    if name in _SWITCHES:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: expected true or false, got {value!r}")
        return value
    if name in _RANGES:
        lowest, highest = _RANGES[name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < lowest or (highest is not None and value > highest):  # type: ignore[operator]
            above = "on" if highest is None else f"to {highest}"
            raise UsageError(
                f"{where}: expected a whole number from {lowest} {above}, got {value!r}"
            )
        return value
    if name in _CHOICES:
        word = value.lower().replace("-", "_") if isinstance(value, str) else value
        if word not in _CHOICES[name]:
            raise UsageError(f"{where}: expected one of {', '.join(_CHOICES[name])}, got {value!r}")
        return word
    return _damping(where, value)


def _damping(where: str, value: Any) -> str:
    try:
        Spec(damping=value).to_proto()
    except Error as error:
        raise UsageError(f"{where}: {error.message.removeprefix('spec.damping: ')}") from error
    assert isinstance(value, str)
    return value


def _pattern(where: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where}: expected a regular expression, got {value!r}")
    try:
        re.compile(value)
    except re.error as error:
        raise UsageError(
            f"{where}: expected a regular expression, got {value!r}: {error}"
        ) from error
    return value


def _mapping(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected a mapping, got {_kind(value)}")
    return value


def _check_keys(where: str, mapping: Mapping[Any, Any], allowed: Sequence[str]) -> None:
    for key in mapping:
        if key not in allowed:
            raise UsageError(f"{where}: {key}: expected one of {', '.join(allowed)}, got {key!r}")


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list"
    return "a mapping" if isinstance(value, dict) else repr(value)
