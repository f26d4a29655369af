"""Recipes: which module gets which spec, what is refused, and that they read what they write."""

import re
from pathlib import Path
from typing import Any

import pytest
from certiq import Spec
from certiq.model.errors import UsageError
from certiq.model.recipe import SETTINGS, Recipe
from programs import ROOT

FLAGS = Spec(method="optq", bits=4, symmetric=True, group_size=128, format="compressed_tensors")

Q = "model.layers.3.self_attn.q_proj"
EXPERT = "model.layers.3.mlp.experts.7.w1"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, *ignore: str) -> Recipe:
    return Recipe.read(write(folder, text), FLAGS, ignore)


def spec_of(recipe: Recipe, name: str) -> Spec:
    spec = recipe.spec_of(name)
    assert spec is not None
    return spec


def test_flags_are_one_spec_for_all_but_the_ignored() -> None:
    recipe = Recipe.of_flags(FLAGS, [r"q_proj$", r"experts\.0\."])
    assert recipe.spec_of(Q) is None
    assert recipe.spec_of("model.layers.0.mlp.experts.0.w1") is None
    assert recipe.spec_of(EXPERT) == FLAGS
    assert recipe.spec_of("model.layers.3.self_attn.q_proj_extra") == FLAGS


def test_the_file_wins_over_flags_and_flags_fill_the_rest(tmp_path: Path) -> None:
    recipe = read(tmp_path, "version: 1\ndefault: {bits: 3, quality: best, method: null}\n")
    spec = spec_of(recipe, Q)
    assert (spec.bits, spec.quality, spec.method) == (3, "best", None)
    assert (spec.group_size, spec.symmetric, spec.format) == (128, True, "compressed_tensors")


RULES = """
version: 1
rules:
  - match: '\\.self_attn\\.'
    bits: 8
    group_size: 64
  - match: [layers\\.3\\., lm_head]
    bits: 3
  - match: experts
    ignore: true
  - match: experts\\.7\\.
    ignore: false
    order: decreasing-norm
"""


def test_the_last_rule_that_matches_wins_field_by_field(tmp_path: Path) -> None:
    recipe = read(tmp_path, RULES)
    other = spec_of(recipe, "model.layers.2.self_attn.q_proj")
    assert (other.bits, other.group_size) == (8, 64)
    spec = spec_of(recipe, Q)
    assert (spec.bits, spec.group_size, spec.method) == (3, 64, "optq")
    assert spec_of(recipe, "lm_head").bits == 3
    assert recipe.spec_of("model.layers.2.mlp.up_proj") == FLAGS
    # Float by one rule, back by a later one, with what the rules between have set.
    assert recipe.spec_of("model.layers.3.mlp.experts.6.w1") is None
    spec = spec_of(recipe, EXPERT)
    assert (spec.bits, spec.order) == (3, "decreasing_norm")


def test_settings_alone_do_not_bring_an_ignored_module_back(tmp_path: Path) -> None:
    text = "version: 1\nrules: [{match: q_proj, ignore: true}, {match: q_proj, bits: 8}]\n"
    assert read(tmp_path, text).spec_of(Q) is None


def test_ignore_flags_are_the_last_rules(tmp_path: Path) -> None:
    recipe = read(tmp_path, RULES, r"experts\.7\.w1")
    assert recipe.spec_of(EXPERT) is None
    assert recipe.spec_of("model.layers.3.mlp.experts.7.w2") is not None


def test_null_in_a_rule_goes_back_to_the_servers_default(tmp_path: Path) -> None:
    text = "version: 1\ndefault: {quality: best}\nrules: [{match: q_proj, quality: null}]\n"
    recipe = read(tmp_path, text)
    assert spec_of(recipe, Q).quality is None
    assert spec_of(recipe, EXPERT).quality == "best"


def test_chosen_is_what_a_rule_asks_a_spec_for(tmp_path: Path) -> None:
    text = """
version: 1
default: {bits: 3}
rules:
  - {match: lm_head, bits: 8}
  - {match: embed_tokens, ignore: false}
  - {match: visual, bits: 8}
  - {match: visual, ignore: true}
"""
    recipe = read(tmp_path, text)
    assert recipe.chosen("lm_head")
    assert recipe.chosen("model.embed_tokens")
    assert not recipe.chosen("visual.merger")
    assert not recipe.chosen(Q)
    assert not Recipe.of_flags(FLAGS).chosen("lm_head")


def test_a_rule_that_finds_nothing_is_told(tmp_path: Path) -> None:
    recipe = read(tmp_path, RULES, "q_prj")
    told = recipe.unmatched([Q, "lm_head"])
    assert told == [
        f"{tmp_path}/recipe.yaml: rule 3 matches none of the 2 modules ('experts')",
        f"{tmp_path}/recipe.yaml: rule 4 matches none of the 2 modules ('experts\\\\.7\\\\.')",
        "--ignore matches none of the 2 modules ('q_prj')",
    ]
    assert recipe.unmatched([Q, "lm_head", EXPERT, "q_prj"]) == []


ALL = """
version: 1
default:
  method: qronos
  bits: 3
  symmetric: false
  group_size: 32
  format: gptq-v2
  quality: best
  group_scales: static
  scale: compensated
  scale_objective: quantized_inputs
  scale_passes: 2
  scale_trials: 0
  signed_scales: false
  polish: 1
  rounding: stochastic
  seed: 18446744073709551615
  order: decreasing_norm
  damping: held_out:0.001,0.01
  on_failure: nearest
rules:
  - {match: 'häd: #"''', symmetric: true, bits: null}
  - {match: [a, "b\\\\.c"], ignore: false, polish: 0}
  - {match: x, ignore: true}
"""


@pytest.mark.parametrize("text", [ALL, RULES, "version: 1\n", "version: 1\ndefault:\nrules:\n"])
def test_what_is_resolved_reads_back_as_it_was(text: str, tmp_path: Path) -> None:
    recipe = read(tmp_path, text, "last one")
    written = write(tmp_path, recipe.resolved())
    # Other flags do not matter then.
    again = Recipe.read(written, Spec(bits=8, quality="fast", seed=1))
    assert again == recipe
    assert again.resolved() == recipe.resolved()


def test_what_is_resolved_says_all(tmp_path: Path) -> None:
    recipe = read(tmp_path, ALL)
    assert all(f"  {name}:" in recipe.resolved() for name in SETTINGS)
    assert recipe.default.damping == "held_out:0.001,0.01"
    assert recipe.default.seed == 2**64 - 1
    assert """match: 'häd: #"'''""" in recipe.resolved()
    assert re.findall(r"^\w+", recipe.resolved(), re.MULTILINE) == ["version", "default", "rules"]


def test_flags_read_back_as_a_file(tmp_path: Path) -> None:
    recipe = Recipe.of_flags(FLAGS, ["lm_head", r"\.0\."])
    assert Recipe.read(write(tmp_path, recipe.resolved()), Spec()) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": expected a mapping, got nothing"),
        ("- 1", ": expected a mapping, got a list"),
        ("version: 1\n  default: 2", ": expected YAML, got what PyYAML refuses: "),
        ("version: !!python/object:os.system 1", ": expected YAML, got what PyYAML refuses: "),
        ("rules: []", ": expected version: 1, got no version"),
        ("version: 2", ": version: expected 1, got 2"),
        ("version: true", ": version: expected 1, got True"),
        ("version: '1'", ": version: expected 1, got '1'"),
        ("version: 1\nrule: []", ": rule: expected one of version, default, rules, got 'rule'"),
        ("version: 1\nversion: 1", ": version: expected each key once, got it again in line 2"),
        ("version: 1\ndefault: 4", ": default: expected a mapping, got 4"),
        ("version: 1\ndefault: {bit: 4}", ": default: bit: expected one of method, bits,"),
        ("version: 1\ndefault: {grid: 4}", ": default: grid: expected one of method, bits,"),
        ("version: 1\ndefault: {ignore: true}", ": default: ignore: expected one of method,"),
        (
            "version: 1\ndefault:\n  bits: 4\n  bits: 3",
            ": default: bits: expected each key once, got it again in line 4",
        ),
        (
            "version: 1\ndefault: {bits: '4'}",
            ": default: bits: expected a whole number from 2 to 8, got '4'",
        ),
        (
            "version: 1\ndefault: {bits: true}",
            ": default: bits: expected a whole number from 2 to 8, got True",
        ),
        (
            "version: 1\ndefault: {bits: 9}",
            ": default: bits: expected a whole number from 2 to 8, got 9",
        ),
        (
            "version: 1\ndefault: {group_size: -1}",
            ": default: group_size: expected a whole number from 0 on, got -1",
        ),
        (
            "version: 1\ndefault: {symmetric: 1}",
            ": default: symmetric: expected true or false, got 1",
        ),
        (
            "version: 1\ndefault: {method: awq}",
            ": default: method: expected one of nearest, optq, qronos, got 'awq'",
        ),
        (
            "version: 1\ndefault: {format: gguf}",
            ": default: format: expected one of gptq, gptq_v2, compressed_tensors, dense_f32,",
        ),
        (
            "version: 1\ndefault: {damping: often}",
            ": default: damping: expected relative_trace:NUMBER, absolute:NUMBER,",
        ),
        ("version: 1\ndefault: {damping: 0.1}", ": default: damping: expected relative_trace:"),
        ("version: 1\nrules: {match: a}", ": rules: expected a list of mappings, got a mapping"),
        ("version: 1\nrules: [a]", ": rule 1: expected a mapping, got 'a'"),
        (
            "version: 1\nrules: [{bits: 3}]",
            ": rule 1: match: expected a regular expression or a list, got none",
        ),
        (
            "version: 1\nrules: [{match: a, bits: 3}, {match: b}]",
            ": rule 2: expected ignore or a setting such as bits, got nothing beside match",
        ),
        (
            "version: 1\nrules: [{match: [], bits: 3}]",
            ": rule 1: match: expected a regular expression or a list, got no items",
        ),
        (
            "version: 1\nrules: [{match: 3, bits: 3}]",
            ": rule 1: match: expected a regular expression, got 3",
        ),
        (
            "version: 1\nrules: [{match: '', bits: 3}]",
            ": rule 1: match: expected a regular expression, got ''",
        ),
        (
            "version: 1\nrules: [{match: [a, '(b'], bits: 3}]",
            ": rule 1: match: expected a regular expression, got '(b': missing )",
        ),
        (
            "version: 1\nrules: [{match: a, bits: 1}]",
            ": rule 1: bits: expected a whole number from 2 to 8, got 1",
        ),
        (
            "version: 1\nrules: [{match: a, width: 3}]",
            ": rule 1: width: expected one of match, ignore, method, bits,",
        ),
        (
            "version: 1\nrules: [{match: a, format: gptq}]",
            ": rule 1: format: expected it in default only, as a checkpoint has one format, got",
        ),
        (
            "version: 1\nrules: [{match: a, ignore: 1}]",
            ": rule 1: ignore: expected true or false, got 1",
        ),
        (
            "version: 1\nrules: [{match: a, ignore: null}]",
            ": rule 1: ignore: expected true or false, got None",
        ),
        (
            "version: 1\nrules: [{match: a, ignore: true, bits: 3}]",
            ": rule 1: ignore: expected true alone or false, got true beside bits",
        ),
        (
            "version: 1\nrules:\n- {match: a, bits: 3}\n- match: a\n  bits: 3\n  bits: 4",
            ": rule 2: bits: expected each key once, got it again in line 6",
        ),
    ],
)
def test_mistakes_are_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        read(tmp_path, text)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/recipe.yaml{said}")
    assert "\n" not in message


def test_the_example_of_the_readme_reads(tmp_path: Path) -> None:
    readme = ROOT / "client/python/src/certiq/model/README.md"
    (example,) = re.findall(r"```yaml\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    recipe = read(tmp_path, example)
    assert (spec_of(recipe, Q).bits, spec_of(recipe, "lm_head").bits) == (4, 8)
    assert recipe.spec_of("model.layers.3.mlp.shared_experts.up_proj") is None


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: No such file"):
        Recipe.read(tmp_path / "nowhere", FLAGS)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"version: 1 # \xff")
    with pytest.raises(UsageError, match=r"latin.yaml: expected UTF-8"):
        Recipe.read(path, FLAGS)


@pytest.mark.parametrize("make", [Recipe.of_flags, None])
def test_a_bad_flag_is_named(make: Any, tmp_path: Path) -> None:  # noqa: ANN401
    with pytest.raises(UsageError, match=r"^--ignore: expected a regular expression, got '\*'"):
        make(FLAGS, ["*"]) if make else read(tmp_path, "version: 1", "*")
