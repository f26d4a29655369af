"""certiq-check-model: undamaged checkpoints of every format, and damage of each kind it knows."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers
import unpack
from certiq.model.cli import main as quantize_model
from certiq.model.errors import UsageError
from certiq.model.loaders.check import READERS, CheckResult, check_model
from certiq.model.loaders.cli import main
from certiq.model.loaders.loading import Loaded, compare_with, logits_equal, prove
from certiq.model.loaders.table import RULES
from certiq.model.loaders.tensor_parallel import largest_tensor_parallel
from certiq.torch import set_weight
from programs import Server
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj"
OUT = "model.layers.0.self_attn.o_proj"
EXPERT = "model.layers.0.mlp.experts.0.gate_proj"
DOWN = "model.layers.0.mlp.down_proj"
FLAGS = {
    "compressed": ("--group-size", "32"),
    "asymmetric": ("--group-size", "32", "--asymmetric", "--bits", "3"),
    "gptq": ("--group-size", "32", "--format", "gptq"),
    "gptq-v2": (
        *("--group-size", "32", "--format", "gptq-v2", "--asymmetric", "--bits", "8"),
        *("--group-scales", "dynamic", "--order", "decreasing_norm"),
    ),
    "partly": ("--group-size", "32", "--format", "gptq", "--ignore", "down_proj"),
    "dense": ("--format", "dense-bf16"),
}


def llama() -> Any:  # noqa: ANN401
    torch.manual_seed(0)
    # Sizes that every kernel takes.
    shape = models.HEADS | {"hidden_size": 128, "intermediate_size": 256}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()


@pytest.fixture(scope="module")
def written(
    server: Server,
    text: Path,
    tokenizer: Any,  # noqa: ANN401
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A checkpoint of every format, as the driver writes it."""
    root = tmp_path_factory.mktemp("check")
    source = models.save(llama(), tokenizer, root / "source")
    command = ["--server", server.address, "--model", str(source), "--calibration", str(text)]
    command += ["--sequences", "8", "--sequence-length", "64", "--quiet"]
    for name, flags in FLAGS.items():
        assert quantize_model([*command, "--output", str(root / name), *flags]) == 0
    return {name: root / name for name in FLAGS}


class Copy:
    """A checkpoint to damage: its tensors and configuration as they are to be written."""

    def __init__(self, source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        self.folder = folder
        self.tensors = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text())

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    @property
    def group(self) -> dict[str, Any]:
        return self.quantization["config_groups"]["group_0"]

    def remove(self, name: str) -> None:
        for tensor in [own for own in self.tensors if own.startswith(f"{name}.")]:
            del self.tensors[tensor]

    def pack(
        self, name: str, rows: int = 128, features: int = 128, bits: int = 4, group: int = 32
    ) -> None:
        """A packed module of codes 0, symmetric."""
        self.remove(name)
        groups = -(-features // group) if group else 1
        words, across = -(-features * bits // 32), -(-rows * bits // 32)
        if self.quantization["quant_method"] == "gptq":
            made = {
                "qweight": torch.zeros(words, rows, dtype=torch.int32),
                "qzeros": torch.zeros(groups, across, dtype=torch.int32),
                "scales": torch.ones(groups, rows, dtype=torch.float16),
                "g_idx": torch.arange(features, dtype=torch.int32) // (group or features),
            }
        else:
            made = {
                "weight_packed": torch.zeros(rows, words, dtype=torch.int32),
                "weight_scale": torch.ones(rows, groups),
                "weight_shape": torch.tensor([rows, features]),
            }
        self.tensors |= {f"{name}.{role}": tensor for role, tensor in made.items()}

    def make_float(self, name: str, *, told: bool = True, rows: int = 128) -> None:
        self.remove(name)
        self.tensors[f"{name}.weight"] = torch.ones(rows, 128)
        if not told:
            return
        if self.quantization["quant_method"] == "gptq":
            self.quantization["dynamic"] = {f"-:^{name}$": {}}
            listed = [own[: -len(".qweight")] for own in self.tensors if own.endswith(".qweight")]
            self.quantization["modules_in_block_to_quantize"] = [listed]
        else:
            self.quantization["ignore"].append(name)

    def write(self) -> None:
        save_file(self.tensors, self.folder / "model.safetensors", {"format": "pt"})
        (self.folder / "config.json").write_text(json.dumps(self.config))
        # Each has its own test; here it says what config.json says.
        other = self.folder / "quantize_config.json"
        if other.exists() and "quantization_config" in self.config:
            other.write_text(json.dumps(self.quantization))

    def check(self, *readers: str) -> CheckResult:
        self.write()
        return check_model(self.folder, readers or None)


@pytest.fixture
def copy(written: dict[str, Path], tmp_path: Path) -> Callable[[str], Copy]:
    return lambda name: Copy(written[name], tmp_path / "copy")


def said(result: CheckResult) -> list[str]:
    return [str(finding) for finding in result.findings]


def test_undamaged_ones_pass(written: dict[str, Path]) -> None:
    loading = {
        "compressed": {"transformers", "vLLM", "compressed-tensors", "llama.cpp"},
        "asymmetric": {"transformers", "compressed-tensors"},
        "gptq": {"transformers", "vLLM", "GPTQModel", "llama.cpp"},
        "gptq-v2": {"transformers", "GPTQModel", "llama.cpp"},
        "partly": {"transformers", "vLLM", "GPTQModel", "llama.cpp"},
        "dense": {"transformers", "vLLM", "llama.cpp"},
    }
    for name, folder in written.items():
        result = check_model(folder)
        assert result.ok, said(result)
        # What certain readers do not take is said, and nothing else.
        assert {finding.reader for finding in result.findings} <= set(READERS), said(result)
        assert {reader.name for reader in result.loads_in} == loading[name]
        # They are asked for, one by one.
        for reader in loading[name]:
            assert check_model(folder, [reader]).ok, reader
        for reader in set(READERS) - loading[name]:
            alone = check_model(folder, [reader.upper()])
            assert not alone.ok
            assert alone.loads_in == ()
    for name in ("compressed", "gptq", "dense"):
        assert said(check_model(written[name])) == []


Damage = Callable[[Copy], None]


def edit(path: str, **values: Any) -> Damage:  # noqa: ANN401
    """Sets fields of quantization_config, or of the object in it at `path`; None removes."""

    def damage(copy: Copy) -> None:
        target = copy.config
        for key in path.split(".") if path else ():
            target = target[key]
        for key, value in values.items():
            target[key] = value
            if value is None:
                del target[key]

    return damage


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(copy: Copy) -> None:
        copy.tensors[name] = change(copy.tensors[name].clone()).contiguous()

    return damage


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


def drop(name: str) -> Damage:
    def damage(copy: Copy) -> None:
        del copy.tensors[name]

    return damage


def rewrite(name: str, content: str) -> Damage:
    def damage(copy: Copy) -> None:
        (copy.folder / name).write_text(content)

    return damage


def unlink(*names: str) -> Damage:
    def damage(copy: Copy) -> None:
        for name in names:
            (copy.folder / name).unlink()

    return damage


def reverse_groups(copy: Copy) -> None:
    copy.tensors[f"{Q}.g_idx"] = copy.tensors[f"{Q}.g_idx"].flip(0).contiguous()


def without_block(copy: Copy) -> None:
    for name in [own for own in copy.tensors if own.startswith("model.layers.0.")]:
        del copy.tensors[name]


def all_float(copy: Copy) -> None:
    for name in [own[: -len(".weight_packed")] for own in copy.tensors if "_packed" in own]:
        copy.make_float(name)


def tied_head(copy: Copy) -> None:
    copy.config["tie_word_embeddings"] = True
    copy.quantization["ignore"].remove("lm_head")
    copy.pack("lm_head", rows=models.VOCABULARY)


ROLES = "weight_packed", "weight_scale", "weight_shape"
GROUPS = "quantization_config.config_groups.group_0"
INTEGRITY: dict[str, tuple[str, Damage, str]] = {
    "no model_type": ("dense", edit("", model_type=None), "config.json: model_type: expected"),
    "no architectures": ("dense", edit("", architectures=[]), "config.json: architectures: exp"),
    "generation_config": (
        *("dense", rewrite("generation_config.json", '{"eos'), "generation_config.json: expected"),
    ),
    "auto_map": (
        *("dense", edit("", auto_map={"AutoConfig": "configuration_x.X"})),
        "config.json: auto_map promises configuration_x.py, which is not there",
    ),
    "auto_map of numbers": (
        "dense",
        edit("", auto_map={"AutoConfig": 5}),
        "auto_map: expected nam",
    ),
    "no list to ignore": (
        *("compressed", edit("quantization_config", ignore=5)),
        "config.json: quantization_config: ignore: expected a list of names and regular express",
    ),
    "no regular expression": (
        *("compressed", edit(GROUPS, targets=["re:("])),
        "config.json: quantization_config: targets: expected a list of names and regular expressi",
    ),
    "no rules": (
        *("gptq", edit("quantization_config", dynamic={"-:(": {}})),
        "config.json: quantization_config: dynamic: expected regular expressions with objects, got",
    ),
    "no list of modules": (
        *("gptq", edit("quantization_config", modules_in_block_to_quantize="q_proj")),
        "config.json: quantization_config: modules_in_block_to_quantize: expected a list, got 'q_p",
    ),
    "vocabulary": ("dense", unlink("tokenizer.json"), "tokenizer_config.json: expected one of tok"),
    "gap": ("compressed", without_block, "model.layers.0: has no tensors, though model.layers.1"),
    **{
        f"no {role}": (
            *("compressed", drop(f"{Q}.{role}")),
            f"{Q}: expected weight_packed, weight_scale, weight_shape, lacks {role}",
        )
        for role in ROLES
    },
    "no zero points": (
        *("asymmetric", drop(f"{Q}.weight_zero_point"), "weight_zero_point, lacks weight_zero_"),
    ),
    **{
        f"no {role}": (
            *("gptq", drop(f"{Q}.{role}")),
            f"{Q}: expected qweight, qzeros, scales, g_idx, lacks {role}",
        )
        for role in ("qweight", "qzeros", "scales", "g_idx")
    },
    "codes of another type": (
        *("compressed", put(f"{Q}.weight_packed", lambda codes: codes.long())),
        f"{Q}.weight_packed: expected I32 [128, 16] of 128 rows and 128 features with 4 bits, "
        "symmetric, groups of 32, got I64 [128, 16]",
    ),
    "codes of another shape": (
        *("gptq", put(f"{Q}.qzeros", lambda zeros: zeros[:, :-1])),
        f"{Q}.qzeros: expected I32 [4, 16]",
    ),
    "scales that are no floats": (
        *("compressed", put(f"{Q}.weight_scale", lambda scales: scales.int())),
        f"{Q}.weight_scale: expected F64 or F32 or F16 or BF16 [128, 4]",
    ),
    "other weight_shape": (
        *("compressed", put(f"{Q}.weight_shape", lambda shape: shape + 32)),
        f"{Q}.weight_packed: expected I32 [160, 20]",
    ),
    "weight_shape of three": (
        *("compressed", put(f"{Q}.weight_shape", lambda shape: torch.cat([shape, shape[:1]]))),
        f"{Q}: expected tensors that tell rows and features, got",
    ),
    "other bits": (
        *("compressed", edit(f"{GROUPS}.weights", num_bits=5)),
        f"{Q}.weight_packed: expected I32 [128, 20]",
    ),
    "other groups": (
        *("compressed", edit(f"{GROUPS}.weights", group_size=64)),
        f"{Q}.weight_scale: expected F64 or F32 or F16 or BF16 [128, 2]",
    ),
    "groups that do not divide": (
        *("compressed", edit(f"{GROUPS}.weights", group_size=48)),
        f"{Q}: expected features that groups of 48 divide, got 128",
    ),
    "other bits, gptq": (
        *("gptq", edit("quantization_config", bits=8), f"{Q}.qweight: expected I32 [32, 128]"),
    ),
    "other groups, gptq": (
        *("gptq", edit("quantization_config", group_size=64)),
        f"{Q}.scales: expected F64 or F32 or F16 or BF16 [2, 128]",
    ),
    "zero points unasked": (
        *("asymmetric", edit(f"{GROUPS}.weights", symmetric=True)),
        f"{Q}: has weight_zero_point, and quantization_config tells a symmetric grid",
    ),
    "twice": (
        *("compressed", lambda copy: copy.tensors.update({f"{Q}.weight": torch.ones(128, 128)})),
        f"{Q}: has both a float weight and packed tensors: expected either",
    ),
    "packed and ignored": (
        *("compressed", lambda copy: copy.quantization["ignore"].append("re:.*q_proj")),
        f"{Q}: has packed tensors, and quantization_config tells that it is float",
    ),
    "a tied head": (
        *("compressed", tied_head),
        "lm_head: is packed: expected tie_word_embeddings false in config.json, got true",
    ),
    "a table no group targets": (
        *("compressed", lambda copy: copy.pack("model.embed_tokens", rows=models.VOCABULARY)),
        "model.embed_tokens: has packed tensors, and quantization_config tells that it is float",
    ),
    "packed and excluded": (
        *("gptq", edit("quantization_config", dynamic={"-:.*q_proj": {}})),
        f"{Q}: has packed tensors, and quantization_config tells that it is float",
    ),
    "packed without a config": (
        *("compressed", edit("", quantization_config=None)),
        "is packed, and config.json has no quantization_config",
    ),
    "float untold": (
        *("compressed", lambda copy: copy.make_float(Q, told=False)),
        f"{Q}: is float and quantization_config does not tell so: loaders look for packed tensors",
    ),
    "target without tensors": (
        *("compressed", lambda copy: copy.group["targets"].append("model.layers.0.mlp.more")),
        "model.layers.0.mlp.more: quantization_config tells that it is packed",
    ),
    "listed without tensors": (
        "gptq",
        edit(
            "quantization_config",
            modules_in_block_to_quantize=[["q_proj", "k_proj", "model.layers.1.mlp.more"]],
        ),
        "model.layers.1.mlp.more: quantization_config tells that it is packed",
    ),
    "nothing packed": ("compressed", all_float, "config.json: has a quantization_config, and no"),
    "scale not finite": (
        *("compressed", put(f"{Q}.weight_scale", first(float("inf")))),
        f"{Q}.weight_scale: expected finite scales, got inf at [0, 3] (1 in all)",
    ),
    "scale zero": (
        *("gptq", put(f"{Q}.scales", first(0.0))),
        f"{Q}.scales: expected scales beside zero, got 0.0 at [0, 3]",
    ),
    "scale negative": (
        *("asymmetric", put(f"{Q}.weight_scale", first(-1.0))),
        f"{Q}.weight_scale: expected positive scales with zero points, got -1.0 at [0, 3]",
    ),
    "scales of another type": (
        *("compressed", put(f"{Q}.weight_scale", lambda scales: scales.bfloat16())),
        f"{Q}.weight_scale: expected config.json's dtype float32, got bfloat16",
    ),
    "weight not finite": (
        *("dense", put("model.norm.weight", first(float("nan")))),
        "model.norm.weight: expected finite values, got nan at [3] (1 in all)",
    ),
    "float16 not finite": (
        "gptq",
        put("model.embed_tokens.weight", lambda table: first(float("-inf"))(table.half())),
        "model.embed_tokens.weight: expected finite values, got -inf at [0, 3] (1 in all)",
    ),
    "order untold": (
        *("gptq", reverse_groups),
        f"{Q}.g_idx: has groups in another order than the columns': expected desc_act true",
    ),
    "groups out of range": (
        *("gptq-v2", put(f"{Q}.g_idx", first(4))),
        f"{Q}.g_idx: expected groups 0 ... 3, got 0 ... 4",
    ),
    "another method": (
        *("gptq", edit("quantization_config", quant_method="awq")),
        "config.json: quantization_config: expected quant_method gptq, or compressed-tensors",
    ),
    "another version": (
        *("gptq", edit("quantization_config", checkpoint_format="marlin")),
        "config.json: quantization_config: checkpoint_format: expected gptq or gptq_v2",
    ),
    "no bits": (
        *("gptq", edit("quantization_config", bits=None)),
        "config.json: quantization_config: expected whole numbers bits and group_size",
    ),
    "no groups of targets": (
        *("compressed", edit("quantization_config", config_groups={})),
        "config.json: quantization_config: config_groups: expected one group or more",
    ),
    "no weights' arguments": (
        *("compressed", edit(GROUPS, weights=None)),
        "config.json: quantization_config: config_groups.group_0: expected targets, and weights",
    ),
}


@pytest.mark.parametrize("case", INTEGRITY)
def test_damage_is_an_error(case: str, copy: Callable[[str], Copy]) -> None:
    format, damage, expected = INTEGRITY[case]
    made = copy(format)
    damage(made)
    result = made.check()
    # Some begin with a tensor's name that is the first of many.
    errors = [line for line in said(result) if line.startswith("error: ")]
    assert any(expected in line for line in errors), said(result)
    assert result.loads_in == ()


def test_hints_are_warnings(copy: Callable[[str], Copy]) -> None:
    made = copy("compressed")
    made.config["num_hidden_layers"] = 3
    made.config["auto_map"] = {"AutoConfig": "someone/else--configuration_x.X"}
    made.tensors["model.layers.0.mlp.router.weight"] = torch.ones(8, 128)
    # A buffer, and a scale that turns its symmetric grid over.
    made.tensors["model.mask"] = torch.full((2, 2), float("-inf"))
    made.tensors[f"{Q}.weight_scale"][0, 0] *= -1
    unlink("tokenizer.json", "tokenizer_config.json")(made)
    result = made.check()
    assert result.ok
    assert said(result) == [
        "warning: config.json: auto_map: the code of someone/else--configuration_x.X is not in "
        "this folder",
        "warning: .: there is no tokenizer",
        "warning: model.layers: config.json promises 3 blocks, the tensors have 2",
        "warning: model.layers.0.mlp.router: is float and quantization_config does not tell so: a "
        "loader for which it is a linear looks for packed tensors",
    ]


def test_quantize_config_says_the_same(copy: Callable[[str], Copy]) -> None:
    made = copy("gptq")
    made.write()
    other = made.folder / "quantize_config.json"
    other.write_text(json.dumps(made.quantization | {"bits": 8}))
    assert said(check_model(made.folder)) == [
        "error: quantize_config.json: bits: expected 4 as in config.json, got 8"
    ]


def test_config_that_is_no_json(copy: Callable[[str], Copy]) -> None:
    made = copy("dense")
    (made.folder / "config.json").write_text('{"model_type": ')
    assert "error: config.json: expected JSON" in said(check_model(made.folder))[0]
    (made.folder / "config.json").write_text("[]")
    assert "error: config.json: expected an object, got []" in said(check_model(made.folder))


def shards(folder: Path) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """The tensors in two files and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {
            name: f"{number}.safetensors" for number in (0, 1) for name in halves[number]
        },
    }
    return [{name: tensors[name] for name in half} for half in halves], index


def break_file(folder: Path) -> None:
    whole = (folder / "1.safetensors").read_bytes()
    (folder / "1.safetensors").write_bytes(whole[:-5])


SHARDS: dict[str, tuple[Callable[[Any, Any], None], Callable[[Path], None], str]] = {
    "whole": (lambda parts, index: None, lambda folder: None, ""),
    "in neither file": (
        *(lambda parts, index: parts[1].pop("model.norm.weight"), lambda folder: None),
        f"error: model.norm.weight: {INDEX} puts it into 1.safetensors, which has it not",
    ),
    "in the other file": (
        lambda parts, index: parts[0].update(
            {"model.norm.weight": parts[1].pop("model.norm.weight")}
        ),
        lambda folder: None,
        f"error: model.norm.weight: {INDEX} puts it into 1.safetensors, it is in 0.safetensors",
    ),
    "in both files": (
        lambda parts, index: parts[0].update({"model.norm.weight": torch.ones(128)}),
        lambda folder: None,
        "error: model.norm.weight: is in 0.safetensors and in 1.safetensors: once alone",
    ),
    "not in the index": (
        lambda parts, index: index["weight_map"].pop("model.norm.weight"),
        lambda folder: None,
        f"error: model.norm.weight: is in 1.safetensors and not in {INDEX}: loaders lose it",
    ),
    "no file": (
        *(lambda parts, index: None, lambda folder: (folder / "1.safetensors").unlink()),
        f"error: 1.safetensors: is named in {INDEX} and is not there",
    ),
    "cut short": (
        *(lambda parts, index: None, break_file),
        "error: 1.safetensors: expected a whole safetensors file, it is cut short or broken",
    ),
    "another size": (
        lambda parts, index: index["metadata"].update(total_size=7),
        lambda folder: None,
        f"warning: {INDEX}: total_size: expected ",
    ),
    "no index": (
        *(lambda parts, index: index.pop("weight_map"), lambda folder: None),
        f"error: {INDEX}: expected JSON with a weight_map of names and files",
    ),
    "another file": (
        lambda parts, index: None,
        lambda folder: shutil.copy(folder / "1.safetensors", folder / "2.safetensors") and None,
        f"warning: 2.safetensors: is not named in {INDEX}: no loader reads its tensors",
    ),
    "a single file too": (
        lambda parts, index: None,
        lambda folder: shutil.copy(folder / "1.safetensors", folder / "model.safetensors") and None,
        f"error: model.safetensors: stands beside {INDEX}",
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_index_and_files_agree(case: str, written: dict[str, Path], tmp_path: Path) -> None:
    before, after, expected = SHARDS[case]
    folder = tmp_path / "copy"
    shutil.copytree(written["dense"], folder)
    parts, index = shards(folder)
    before(parts, index)
    for number, part in enumerate(parts):
        save_file(part, folder / f"{number}.safetensors", {"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))
    after(folder)
    result = check_model(folder)
    if not expected:
        assert said(result) == []
        return
    assert any(line.startswith(expected) for line in said(result)), said(result)
    assert result.ok == expected.startswith("warning")


def two_groups(copy: Copy, name: str, bits: int = 8, rows: int = 128) -> None:
    """One module with bits of its own."""
    copy.pack(name, bits=bits, rows=rows)
    if copy.quantization["quant_method"] == "gptq":
        copy.quantization["dynamic"] = {f"+:^{name}$": {"bits": bits}}
        return
    own = json.loads(json.dumps(copy.group))
    own["weights"]["num_bits"] = bits
    own["targets"] = [name]
    copy.quantization["config_groups"]["group_1"] = own


def experts(copy: Copy, *bits: int) -> None:
    for number, own in enumerate(bits):
        name = f"model.layers.0.mlp.experts.{number}.gate_proj"
        copy.pack(name)
        if own != 4:
            two_groups(copy, name, own)


def asymmetric_expert(copy: Copy) -> None:
    for role in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"):
        copy.tensors[f"{EXPERT}.{role}"] = copy.tensors[f"{Q}.{role}"].clone()


def one_float_expert(copy: Copy) -> None:
    experts(copy, 4, 4)
    copy.make_float(EXPERT)


def packed_embeddings(copy: Copy) -> None:
    own = json.loads(json.dumps(copy.group)) | {"targets": ["Embedding"]}
    copy.quantization["config_groups"]["group_1"] = own
    copy.pack("model.embed_tokens", rows=models.VOCABULARY)


def siblings_in_8_bits(copy: Copy) -> None:
    for name, rows in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)):
        copy.pack(f"model.layers.0.self_attn.{name}", rows=rows, bits=8)
    copy.quantization["dynamic"] = {r"+:^model\.layers\.0\.self_attn\.[qkv]_proj$": {"bits": 8}}


def asymmetric_and_mixed(copy: Copy) -> None:
    own = json.loads(json.dumps(copy.group))
    own["weights"] |= {"num_bits": 4, "symmetric": True}
    own["targets"] = [OUT]
    copy.quantization["config_groups"]["group_1"] = own
    copy.pack(OUT)


def without_excluding(copy: Copy) -> None:
    copy.make_float(DOWN)
    del copy.quantization["dynamic"]


def without_list(copy: Copy) -> None:
    copy.make_float(DOWN)
    del copy.quantization["modules_in_block_to_quantize"]


def odd_groups(copy: Copy) -> None:
    copy.pack(OUT, features=192, group=128)
    copy.quantization["dynamic"] = {f"+:^{OUT}$": {"group_size": 128}}


def mixtral(copy: Copy) -> None:
    copy.config["model_type"] = "mixtral"
    experts(copy, 4)


def channels(copy: Copy) -> None:
    copy.group["weights"] |= {"strategy": "channel", "group_size": None}
    for name in [own[: -len(".weight_packed")] for own in copy.tensors if "_packed" in own]:
        copy.pack(name, *copy.tensors[f"{name}.weight_shape"].tolist(), group=0)


def reordered_columns(copy: Copy) -> None:
    index = torch.arange(128, dtype=torch.int32).flip(0) // 32
    copy.tensors[f"{Q}.weight_g_idx"] = index.contiguous()


def of_gpt2(copy: Copy) -> None:
    copy.config["model_type"] = "gpt2"


# By rule: the reader, a format, the damage, and what is said.
READER_CASES: dict[str, list[tuple[str, str, Damage, str]]] = {
    "siblings_share_a_scheme": [
        (
            *("vLLM", "compressed", lambda copy: two_groups(copy, Q)),
            f"error: vLLM: {Q}: expected one scheme for all that are one matrix here, got q_proj 8 "
            "bits, symmetric, groups of 32; k_proj 4 bits, symmetric, groups of 32; v_proj 4 bits",
        ),
        (
            *("vLLM", "gptq", lambda copy: copy.make_float(Q)),
            f"error: vLLM: {Q}: expected one scheme for all that are one matrix here, got q_proj f",
        ),
    ],
    "dynamic_knows_fused_names": [
        (
            *("vLLM", "gptq", siblings_in_8_bits),
            f"error: vLLM: {Q}: has 8 bits, symmetric, groups of 32 by dynamic: expected an "
            "expression there that matches model.layers.0.self_attn.qkv_proj too",
        )
    ],
    "experts_share_a_scheme": [
        (
            *("vLLM", "compressed", lambda copy: experts(copy, 4, 8)),
            "error: vLLM: model.layers.0.mlp.experts: expected one scheme for all experts, got",
        )
    ],
    "groups_divide_features": [
        (
            *("vLLM", "gptq", odd_groups),
            f"error: vLLM: {OUT}: expected features that groups of 128 divide, got 192",
        )
    ],
    "codes_fill_words": [
        (
            *(reader, "gptq", lambda copy: copy.pack(OUT, rows=132)),
            f"error: {reader}: {OUT}: expected rows whose codes of 4 bits fill words of 32 bits",
        )
        for reader in ("vLLM", "llama.cpp")
    ],
    "codes_of_3_bits_fill_words": [
        (
            *(reader, "gptq", lambda copy: two_groups(copy, OUT, bits=3, rows=132)),
            f"error: {reader}: {OUT}: expected rows divisible by 32 with 3 bits, got 132",
        )
        for reader in ("transformers", "GPTQModel")
    ],
    "sizes_suit_marlin": [
        (
            *("vLLM", "compressed", lambda copy: copy.pack(OUT, rows=96)),
            f"warning: vLLM: {OUT}: runs without the Marlin kernels",
        )
    ],
    "dequantize_is_asked_for": [
        (
            *("transformers", "asymmetric", lambda copy: None),
            "warning: transformers: config.json: grids with zero points load only with",
        ),
        (
            *("transformers", "compressed", packed_embeddings),
            "warning: transformers: config.json: packed embeddings load only with",
        ),
    ],
    "experts_are_symmetric": [
        (
            *("transformers", "asymmetric", asymmetric_expert),
            f"error: transformers: {EXPERT}: is an expert, whose zero points are not read",
        )
    ],
    "dense_layers_share_a_scheme": [
        (
            *("transformers", "asymmetric", asymmetric_and_mixed),
            f"error: transformers: {OUT}: has 4 bits, symmetric, groups of 32, and is read with 3 ",
        )
    ],
    "experts_are_packed_together": [
        (
            *("transformers", "compressed", one_float_expert),
            "error: transformers: model.layers.0.mlp.experts: expected experts that are all packed "
            f"or all float, got {EXPERT} float",
        )
    ],
    "experts_have_their_groups_scheme": [
        (
            *("transformers", "compressed", lambda copy: experts(copy, 8)),
            f"error: transformers: {EXPERT}: has 8 bits, symmetric, groups of 32, and is read with "
            "4 bits",
        )
    ],
    "lm_head_is_told": [
        (
            *(reader, "gptq", lambda copy: copy.pack("lm_head", rows=160)),
            f"error: {reader}: lm_head: is packed: expected lm_head true in quantization_config",
        )
        for reader in ("vLLM", "GPTQModel")
    ],
    "blocks_tell_their_floats": [
        (
            *("transformers", "gptq", without_list),
            f"error: transformers: {DOWN}: is float: expected modules_in_block_to_quantize",
        )
    ],
    "packed_ones_are_in_blocks": [
        (
            *("transformers", "gptq", lambda copy: copy.pack("lm_head", rows=160)),
            "error: transformers: lm_head: is packed: expected packed linears within blocks alone",
        )
    ],
    "bits_are_the_same": [
        (
            *(reader, "gptq", lambda copy: two_groups(copy, OUT)),
            f"error: {reader}: {OUT}: has 8 bits, symmetric, groups of 32: expected 4 bits",
        )
        for reader in ("transformers", "llama.cpp")
    ],
    "no_conv1d": [
        (
            *(reader, format, of_gpt2),
            f"error: {reader}: config.json: the linears of gpt2 are Conv1D: expected nn.Linear",
        )
        for reader, format in (
            *(("transformers", "compressed"), ("transformers", "gptq")),
            *(("compressed-tensors", "compressed"), ("llama.cpp", "gptq")),
        )
    ],
    "experts_are_no_linears": [
        (
            *("transformers", "gptq", lambda copy: experts(copy, 4)),
            f"error: transformers: {EXPERT}: is an expert, which is",
        )
    ],
    "dynamic_tells_floats": [
        (
            *("GPTQModel", "gptq", without_excluding),
            f'error: GPTQModel: {DOWN}: is float: expected an expression "-:" in dynamic',
        )
    ],
    "no_experts_of_mixtral": [
        (
            *("GPTQModel", "gptq", mixtral),
            f"error: GPTQModel: {EXPERT}: is an expert",
        )
    ],
    "converter_unpacks_words": [
        (
            *("llama.cpp", "asymmetric", lambda copy: None),
            "error: llama.cpp: model.layers.0.mlp.down_proj: expected 2, 4 or 8 bits, got 3",
        )
    ],
    "converter_wants_groups": [
        (
            *("llama.cpp", "compressed", channels),
            "error: llama.cpp: model.layers.0.mlp.down_proj: expected groups (strategy group)",
        )
    ],
    "converter_wants_one_group": [
        (
            *("llama.cpp", "compressed", lambda copy: two_groups(copy, OUT)),
            "error: llama.cpp: config.json: config_groups: expected one, got 2",
        )
    ],
    "groups_are_of_neighbours": [
        (
            *("llama.cpp", "compressed", reordered_columns),
            f"error: llama.cpp: {Q}: expected groups of neighbouring columns, got others",
        )
    ],
}


@pytest.mark.parametrize(
    ("rule", "index"), [(rule, i) for rule, own in READER_CASES.items() for i in range(len(own))]
)
def test_rules_of_readers(rule: str, index: int, copy: Callable[[str], Copy]) -> None:
    reader, format, damage, expected = READER_CASES[rule][index]
    made = copy(format)
    damage(made)
    result = made.check(reader)
    assert any(line.startswith(expected) for line in said(result)), said(result)
    # The checkpoint itself is whole.
    assert {finding.reader for finding in result.errors} <= {reader}, said(result)
    refused = expected.startswith("error")
    assert bool(result.loads_in) == (not refused)
    # Nobody asked for it: others load it, and it is told; or nobody does.
    free = check_model(made.folder)
    assert reader in {own.name for own in free.loads_in} or refused
    assert free.ok == bool(free.loads_in)
    assert any(expected.removeprefix("error: ") in line for line in said(free)), said(free)


def test_every_rule_has_its_test() -> None:
    asked = {(rule, case[0]) for rule, own in READER_CASES.items() for case in own}
    assert asked == {(rule.check.__name__, rule.reader) for rule in RULES}
    for rule in RULES:
        assert rule.versions
        assert rule.source
        assert rule.formats


def test_formats_and_bits_are_those_of_the_table(written: dict[str, Path]) -> None:
    (finding,) = check_model(written["asymmetric"], ["vllm"]).errors
    assert str(finding).startswith("error: vLLM: config.json: expected bits any, grid symmetric")
    assert str(finding).endswith(
        "got bits 3, grid asymmetric, group size 32, groups in the order columns"
    )
    (finding,) = check_model(written["dense"], ["gptqmodel"]).errors
    assert finding.text == "format: expected one of gptq, gptq_v2, got dense_bf16"


def test_nobody_loads_it(copy: Callable[[str], Copy]) -> None:
    made = copy("compressed")
    reordered_columns(made)
    result = made.check()
    assert result.loads_in == ()
    assert said(result)[-1] == "error: config.json: no reader is known to load it as it is"


def test_tensor_parallel(copy: Callable[[str], Copy], written: dict[str, Path]) -> None:
    # 4 heads, 2 of keys and values; 128 and 256 features.
    assert largest_tensor_parallel(written["compressed"]) == 4
    assert largest_tensor_parallel(written["gptq"]) == 4
    assert check_model(written["gptq"]).tensor_parallel == 4
    # Groups in the order of norms have their columns everywhere.
    assert largest_tensor_parallel(written["gptq-v2"]) == 1
    made = copy("compressed")
    made.group["weights"]["group_size"] = 64
    for name in [own[: -len(".weight_packed")] for own in made.tensors if "_packed" in own]:
        made.pack(name, *made.tensors[f"{name}.weight_shape"].tolist(), group=64)
    made.write()
    assert largest_tensor_parallel(made.folder) == 2
    made.config["num_attention_heads"] = made.config["num_key_value_heads"] = 3
    made.write()
    assert largest_tensor_parallel(made.folder) == 1


def test_command(
    written: dict[str, Path], copy: Callable[[str], Copy], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(written["compressed"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("loads in: transformers 5.24 with compressed-tensors 0.20; vLLM ")
    assert main([str(written["compressed"]), "--for", "GPTQModel,vllm"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error: GPTQModel: config.json: format: expected one of gptq")
    assert lines[1].startswith("loads in: vLLM")
    made = copy("compressed")
    del made.tensors[f"{Q}.weight_scale"]
    made.write()
    assert main([str(made.folder), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["loads_in"] == []
    assert told["tensor_parallel"] == 4
    assert told["findings"][0] == {
        "severity": "error",
        "reader": "all",
        "where": Q,
        "text": "expected weight_packed, weight_scale, weight_shape, lacks weight_scale",
    }


def test_usage_errors(
    written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"reader: expected some of .*, got ollama"):
        check_model(written["dense"], ["ollama"])
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "expected config.json, found none" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "expected model.safetensors or model.safetensors.index.json" in capsys.readouterr().err
    assert main([str(written["dense"]), "--for", ""]) == 2


def test_starts_without_torch() -> None:
    code = (
        "import sys, certiq.model.loaders.cli; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def dequantized(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model that the folder stands for, and its quantized weights."""
    report = json.loads((folder / "report.json").read_text())
    spec, tensors = report["settings"]["spec"], unpack.tensors_of(folder)
    model, weights = llama(), {}
    for linear in report["linears"]:
        name = linear["name"]
        if spec["format"] == "compressed_tensors":
            weight = unpack.compressed(tensors, name, spec["bits"])
        elif spec["format"].startswith("gptq"):
            version = 1 if spec["format"] == "gptq" else 2
            weight = unpack.gptq(tensors, name, spec["bits"], version=version)
        else:
            weight = tensors[f"{name}.weight"].float().numpy()
        weights[name] = torch.from_numpy(np.ascontiguousarray(weight))
        set_weight(model.get_submodule(name), weights[name])
    return model, weights


IDS = torch.arange(40) * 7 % models.VOCABULARY


@pytest.mark.parametrize(
    ("format", "route"),
    [
        ("compressed", "transformers"),
        ("asymmetric", "transformers, CompressedTensorsConfig(dequantize=True)"),
        ("dense", "transformers"),
        pytest.param(
            *("gptq-v2", "transformers with GPTQModel (gptq_torch)"), marks=pytest.mark.slow
        ),
        pytest.param(
            *("partly", "transformers with GPTQModel (gptq_torch)"), marks=pytest.mark.slow
        ),
    ],
)
def test_loads_as_what_it_stands_for(format: str, route: str, written: dict[str, Path]) -> None:
    model, weights = dequantized(written[format])
    proofs = prove(written[format], weights, model, IDS)
    for proof in proofs:
        assert proof.ok, proof
        assert proof.route == route
        assert proof.not_loaded is None
    assert proofs[0].compared == tuple(weights)
    assert proofs[1].compared == ("logits",)
    # The original model's weights and logits are others.
    if format == "compressed":
        original = llama()
        loaded = Loaded(written[format])
        wrong = compare_with(loaded, {Q: original.get_submodule(Q).weight.detach()})
        assert not wrong.ok
        assert "weights differ" in wrong.failures[0]
        wrong = logits_equal(loaded, original, IDS)
        assert not wrong.ok
        assert wrong.failures[0].startswith("logits: expected those of the dequantized model")
        assert logits_equal(loaded, model, IDS).ok
        assert logits_equal(loaded, original, IDS, tolerance=10.0).ok


def test_experts_load_as_what_they_stand_for(
    server: Server,
    text: Path,
    tokenizer: Any,  # noqa: ANN401
    tmp_path: Path,
) -> None:
    """Fused in the model, matrices in the checkpoint."""
    torch.manual_seed(0)
    source = models.save(models.mixtral(experts=2), tokenizer, tmp_path / "source")
    output = tmp_path / "output"
    command = ["--server", server.address, "--model", str(source), "--calibration", str(text)]
    command += ["--sequences", "8", "--sequence-length", "64", "--quiet", "--group-size", "32"]
    assert quantize_model([*command, "--output", str(output)]) == 0
    result = check_model(output)
    assert result.ok, said(result)
    assert "transformers" in {reader.name for reader in result.loads_in}
    tensors = unpack.tensors_of(output)
    block = "model.layers.1.block_sparse_moe.experts.1"
    weights = {
        f"model.layers.1.mlp.experts.1.{name}_proj": torch.from_numpy(
            unpack.compressed(tensors, f"{block}.{stored}", 4)
        )
        for name, stored in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    }
    proof = compare_with(output, weights)
    assert proof.ok, proof
    assert proof.compared == tuple(weights)
    gate, up, down = weights
    proof = compare_with(output, {gate: weights[up], down: weights[down]})
    assert [failure.split(":")[0] for failure in proof.failures] == [gate]


@pytest.mark.parametrize("format", ["compressed", "asymmetric", "dense"])
def test_loading_finds_one_wrong_value(
    format: str, copy: Callable[[str], Copy], written: dict[str, Path]
) -> None:
    _, weights = dequantized(written[format])
    made = copy(format)
    tensor = made.tensors[f"{Q}.weight" if format == "dense" else f"{Q}.weight_packed"]
    # The lowest bit of one code, or of one weight.
    view = tensor.view(torch.int16) if format == "dense" else tensor
    view[5, 2] ^= 1
    made.write()
    assert check_model(made.folder).ok
    proof = compare_with(made.folder, weights)
    assert len(proof.failures) == 1
    assert proof.failures[0].startswith(f"{Q}: expected ")
    assert f"1 of {128 * 128} weights differ" in proof.failures[0]
    assert proof.largest_difference > 0


@pytest.mark.parametrize("table", [False, True], ids=["lm_head", "embeddings"])
def test_tables_load_too(table: bool, copy: Callable[[str], Copy]) -> None:
    made, name = copy("compressed"), "lm_head"
    if table:
        name = "model.embed_tokens"
        packed_embeddings(made)
    else:
        made.quantization["ignore"].remove(name)
        made.pack(name, rows=models.VOCABULARY)
    words = made.tensors[f"{name}.weight_packed"]
    made.tensors[f"{name}.weight_packed"] = torch.arange(words.numel(), dtype=torch.int32).reshape(
        words.shape
    )
    assert made.check("transformers").ok
    expected = torch.from_numpy(unpack.compressed(made.tensors, name, 4))
    loaded = Loaded(made.folder)
    assert loaded.dequantize == table
    assert loaded.result.failures == ()
    assert torch.equal(loaded.result.model.get_submodule(name).weight, expected)


def test_loading_names_what_is_missing(
    copy: Callable[[str], Copy], written: dict[str, Path]
) -> None:
    _, weights = dequantized(written["compressed"])
    made = copy("compressed")
    del made.tensors["model.norm.weight"]
    made.write()
    proof = compare_with(made.folder, {"model.layers.7.mlp.up_proj": weights[Q], Q: weights[Q][1:]})
    assert not proof.ok
    assert "transformers has 1 missing keys: model.norm.weight ..." in proof.failures[0]
    assert proof.failures[1:] == (
        "model.layers.7.mlp.up_proj: the loaded model has no such linear",
        f"{Q}: expected [127, 128], got [128, 128]",
    )
    made.config["architectures"] = ["NoSuchModel"]
    made.config["model_type"] = "no_such_model"
    made.write()
    for proof in (compare_with(made.folder, weights), logits_equal(made.folder, llama(), IDS)):
        assert proof.compared == ()
        assert proof.failures[0].startswith(f"transformers does not load {made.folder}: ")


def test_what_transformers_cannot_load_is_said(copy: Callable[[str], Copy]) -> None:
    made = copy("gptq")
    of_gpt2(made)
    made.write()
    proof = compare_with(made.folder, {Q: torch.ones(128, 128)})
    assert not proof.ok
    assert proof.failures == ()
    assert proof.not_loaded == (
        "error: transformers: config.json: the linears of gpt2 are Conv1D: expected nn.Linear"
    )
    made = Copy(made.folder, made.folder.with_name("with code"))
    made.config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Config"}}
    made.write()
    proof = compare_with(made.folder, {Q: torch.ones(128, 128)})
    assert proof.not_loaded == "of_its_own: the checkpoint's own code is not run"
