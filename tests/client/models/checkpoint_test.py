"""The output is the model's own files with the quantized tensors in the place of float ones."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import driving
import pytest
import torch
import transformers
import unpack
import unusual
from driving import Driver, bytes_of, edit, rewrite
from safetensors import safe_open
from safetensors.torch import save_file

PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
GPTQ = ("qweight", "qzeros", "scales", "g_idx")
UNPACKED = transformers.CompressedTensorsConfig(dequantize=True)
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ANN401
    """In float32, in one file. Nobody changes it."""
    folder = tmp_path_factory.mktemp("llama")
    return unusual.saver(tokenizer, folder)(unusual.llama())


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def assert_kept(source: Path, output: Path, quantized: set[str]) -> None:
    """All tensors but the quantized ones have name, type and bytes; nothing came to them but what
    the quantized ones became."""
    before, after = unpack.tensors_of(source), unpack.tensors_of(output)
    for name, tensor in before.items():
        prefix = name.removesuffix(".weight")
        if prefix in quantized and name.endswith(".weight"):
            continue
        assert name in after, name
        assert after[name].dtype == tensor.dtype, name
        assert after[name].shape == tensor.shape, name
        assert bytes_of(after[name]) == bytes_of(tensor), name
    for name in after.keys() - before.keys():
        prefix, _, role = name.rpartition(".")
        assert prefix in quantized, name
        assert role in (*PACKED, *GPTQ), name


# ---- Tensors ----


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "dense-bf16"])
def test_what_is_not_quantized_keeps_type_and_bytes(format: str, save: Save, drive: Driver) -> None:
    """A model in bfloat16 with a router's bias in float32, a layer that predicts further tokens,
    tensors of types that only files have, and one without values."""
    source = save(unusual.deepseek(), dtype="bfloat16")
    edit(source / "config.json", num_nextn_predict_layers=1)
    generator = torch.Generator().manual_seed(3)
    extra = {
        "model.layers.2.eh_proj.weight": torch.randn(64, 128, generator=generator).bfloat16(),
        "model.layers.2.mlp.experts.0.up_proj.weight": torch.randn(32, 64, generator=generator),
        "mtp.norm.weight": torch.full((64,), 3.0).half(),
        "some.steps": torch.tensor(2**40),
        "some.wide": torch.randn(3, generator=generator, dtype=torch.float64),
        "some.flags": torch.tensor([True, False, True]),
        "some.nothing": torch.empty(0, 5),
        "some.bytes": torch.arange(7, dtype=torch.uint8),
    }
    bias = torch.linspace(6.817, 7.063, 8)[torch.randperm(8, generator=generator)]
    name = "model.layers.1.mlp.gate.e_score_correction_bias"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        assert name in tensors
        tensors[name] = bias
        tensors |= extra

    rewrite(source, change)
    run = drive(source, "--format", format).succeeded()
    quantized = {linear["name"] for linear in run.report()["linears"]}
    assert "model.layers.1.mlp.experts.7.down_proj" in quantized
    assert "model.layers.1.mlp.gate" not in quantized
    assert_kept(source, run.output, quantized)
    assert run.tensors()[name].equal(bias)
    assert run.config()["num_nextn_predict_layers"] == 1
    if format != "dense-bf16":
        # Loaders are told that the further layer is not packed.
        assert is_told_float(run.config()["quantization_config"], "model.layers.2.eh_proj")


def test_float32_states_of_a_model_in_bfloat16(save: Save, drive: Driver) -> None:
    source = save(unusual.mamba2(), dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(("A_log", "dt_bias", ".D")):
                tensors[name] = torch.rand(tensors[name].shape, generator=generator) + 0.1

    rewrite(source, change)
    run = drive(source).succeeded()
    quantized = {linear["name"] for linear in run.report()["linears"]}
    assert_kept(source, run.output, quantized)
    assert sum(tensor.dtype == torch.float32 for tensor in run.tensors().values()) == 6


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("float32", "float16"),
        ("bfloat16", "float16"),
        ("bfloat16", "float32"),
        ("float16", "bfloat16"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                *(("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")),
                *(("float32", "bfloat16"), ("float16", "float32")),
            )
        ),
    ],
)
def test_another_type_for_the_rest(stored: str, wanted: str, save: Save, drive: Driver) -> None:
    """--dtype changes what has the checkpoint's own type, and nothing else."""
    source = save(unusual.llama(), dtype=stored)
    special = torch.full((64,), 1 + 2**-20, dtype=torch.float64)
    rewrite(
        source,
        lambda tensors: tensors.update({"some.gain": special, "some.count": torch.tensor(3)}),
    )
    run = drive(source, "--dtype", wanted, "--layers", 1).succeeded()
    before, after = unpack.tensors_of(source), run.tensors()
    assert after["some.gain"].equal(special)
    assert after["some.count"].equal(torch.tensor(3))
    for name in ("model.embed_tokens.weight", "model.norm.weight", UP):
        assert after[name].equal(before[name].to(getattr(torch, wanted))), name
        assert after[name].dtype == getattr(torch, wanted)
    assert after["model.layers.0.mlp.up_proj.weight_scale"].dtype == getattr(torch, wanted)
    assert run.config()["dtype"] == wanted
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run.output)
    assert loaded.dtype == getattr(torch, wanted)


@pytest.mark.parametrize("value", [1e5, -65520.0])
def test_a_gain_that_float16_cannot_hold_is_refused(
    value: float, copied: Path, drive: Driver
) -> None:
    rewrite(copied, lambda tensors: tensors[NORM].__setitem__(7, value))
    drive(copied, "--dtype", "float16").refused(NORM, f"{value:g}", "65504", "--dtype bfloat16")
    # What is quantized is no concern of the type of the rest; nor is what stays as it is.
    drive(copied, "--dtype", "bfloat16", "--layers", 1).succeeded()


def test_a_gain_of_another_type_stays_in_it(save: Save, drive: Driver) -> None:
    source = save(unusual.llama(), dtype="bfloat16")
    gain = torch.full((64,), 1e5)
    rewrite(source, lambda tensors: tensors.update({"model.norm.weight": gain}))
    run = drive(source, "--dtype", "float16", "--layers", 1).succeeded()
    assert run.tensors()["model.norm.weight"].equal(gain)


@pytest.mark.parametrize("how", ["once", "twice", "shared"])
def test_tied_heads(how: str, save: Save, drive: Driver) -> None:
    source = save(unusual.llama(tie_word_embeddings=True))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if how == "twice":
        rewrite(source, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    elif how == "shared":
        tensors = unpack.tensors_of(source)
        tensors[head] = tensors[embedding]
        (source / "model.safetensors").unlink()
        torch.save(tensors, source / "pytorch_model.bin")
    run = drive.evaluated(source).succeeded()
    stored = run.tensors().keys() & {embedding, head}
    assert stored == ({embedding, head} if how == "twice" else {embedding})
    assert run.config()["tie_word_embeddings"] is True
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        run.output, quantization_config=UNPACKED
    )
    assert_perplexity(loaded, run)


def assert_perplexity(model: Any, run: driving.Outcome) -> None:  # noqa: ANN401
    """The report's perplexity of the quantized model is this one's."""
    assert run.report()["perplexity"]["quantized"] == pytest.approx(
        driving.perplexity(model, run.text), rel=1e-3
    )


# ---- Experts ----


FUSED = [unusual.gpt_oss, unusual.llama4, unusual.granite_moe, unusual.qwen3_moe]


@pytest.mark.parametrize("make", FUSED, ids=lambda make: make.__name__)
def test_experts_come_back_in_the_layout_that_was_stored(
    make: Callable[[], Any], save: Save, drive: Driver
) -> None:
    model = make()
    source = save(model)
    run = drive.evaluated(source, "--format", "dense-f32").succeeded()
    before, after = unpack.tensors_of(source), run.tensors()
    assert before.keys() == after.keys()
    assert all(after[name].shape == before[name].shape for name in before)
    loaded, info = type(model).from_pretrained(run.output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_perplexity(loaded, run)
    # Experts are most of the weights, so they were quantized.
    assert run.report()["plan"]["share_quantized"] > 0.95
    changed = [name for name in before if not before[name].equal(after[name])]
    assert any("expert" in name or "moe" in name for name in changed)


@pytest.mark.parametrize("make", FUSED, ids=lambda make: make.__name__)
def test_packed_checkpoints_of_experts_load_whole(
    make: Callable[[], Any], save: Save, drive: Driver
) -> None:
    """Packed where loaders read them so; else they stay float, and the plan says so."""
    model = make()
    run = drive.evaluated(save(model)).succeeded()
    plan = run.report()["plan"]
    if plan["share_quantized"] < 0.9:
        assert "warning: only" in run.err
        assert any("expert" in name or "moe" in name for name in plan["stay_float"])
    loaded, info = type(model).from_pretrained(
        run.output, quantization_config=UNPACKED, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert_perplexity(loaded, run)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_float_experts_are_told_by_their_tensors_names(
    format: str, save: Save, drive: Driver
) -> None:
    run = drive(
        save(unusual.mixtral()), "--format", format, "--ignore", r"experts\.0\."
    ).succeeded()
    floats = sorted(
        name.removesuffix(".weight")
        for name in run.tensors()
        if "experts.0." in name and name.endswith(".weight")
    )
    assert floats == [
        f"model.layers.{layer}.block_sparse_moe.experts.0.w{number}"
        for layer in range(2)
        for number in (1, 2, 3)
    ]
    for name in floats:
        assert is_told_float(run.config()["quantization_config"], name), name
    assert not is_told_float(
        run.config()["quantization_config"], "model.layers.0.block_sparse_moe.experts.1.w1"
    )


def is_told_float(config: dict[str, Any], name: str) -> bool:
    """True where a loader would not look for this module packed."""
    if config["quant_method"] == "gptq":
        patterns = [key[2:] for key in config.get("dynamic", {}) if key.startswith("-:")]
        return any(re.match(pattern, name) for pattern in patterns)
    return any(
        re.match(item[3:], name) if item.startswith("re:") else item == name
        for item in config["ignore"]
    )


def test_experts_of_later_layers_stay_float(save: Save, drive: Driver) -> None:
    model = unusual.qwen3_moe()
    run = drive.evaluated(save(model), "--layers", 1).succeeded()
    config = run.config()["quantization_config"]
    assert is_told_float(config, "model.layers.1.mlp.experts.0.up_proj")
    assert not is_told_float(config, "model.layers.0.mlp.experts.0.up_proj")
    loaded, info = type(model).from_pretrained(
        run.output, quantization_config=UNPACKED, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert_perplexity(loaded, run)


# ---- Other files ----


def test_every_other_file_is_copied(copied: Path, drive: Driver) -> None:
    texts = {
        "generation_config.json": '{"eos_token_id": [7, 9], "do_sample": true, "top_k": 20}',
        "preprocessor_config.json": "{}",
        "processor_config.json": "{ }",
        "chat_template.jinja": "{{ messages }}\r\n",
        "modeling_mine.py": "class Model: pass\n",
        "configuration_mine.py": "class Config: pass\n",
        "LICENSE": "as you like",
        "README.md": "\ufeffÄ",
        "assets/picture.png": "no picture",
        "additional_chat_templates/tool.jinja": "",
        "vocab.txt": "",
    }
    for name, content in texts.items():
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_bytes(content.encode())
    for name in (
        "model.onnx",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        ".hidden",
    ):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_bytes(b"other weights")
    auto_map = {
        "AutoConfig": "configuration_mine.Config",
        "AutoModelForCausalLM": "modeling_mine.Model",
    }
    edit(copied / "config.json", auto_map=auto_map)
    run = drive(copied).succeeded()
    for name, content in texts.items():
        assert (run.output / name).read_bytes() == content.encode(), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (run.output / name).read_bytes() == (copied / name).read_bytes(), name
    assert run.config()["auto_map"] == auto_map
    report = run.report()["files"]
    assert set(texts) <= set(report["copied"])
    assert sorted(report["not_copied"]) == [
        "consolidated.safetensors",
        "model.onnx",
        "original/consolidated.00.pth",
    ]
    assert not (run.output / ".hidden").exists()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("generation_config.json", {"temperature": 0.6, "top_p": 0.9, "do_sample": False}),
        ("config.json", {"temperature": 0.6, "top_p": 0.9}),
        ("config.json", {"max_length": 10, "num_beams": 1, "early_stopping": True}),
    ],
)
def test_defaults_that_transformers_would_not_save(
    file: str, changes: dict[str, object], copied: Path, drive: Driver
) -> None:
    edit(copied / file, **changes)
    run = drive(copied).succeeded()
    found = json.loads((run.output / file).read_text())
    assert found == found | changes


def test_the_configuration_is_kept_key_by_key(copied: Path, drive: Driver) -> None:
    file = copied / "config.json"
    config = json.loads(file.read_text())
    config.pop("rope_parameters", None)
    config.pop("dtype", None)
    config |= {
        "torch_dtype": "float32",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        "rope_theta": 500000.0,
        "my_field": {"a": [1, 2, {"b": None}], "größe": "ß"},
        "pretraining_tp": 1,
    }
    file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    run = drive.evaluated(copied).succeeded()
    found = run.config()
    quantization = found.pop("quantization_config")
    assert quantization["quant_method"] == "compressed-tensors"
    assert list(found.items()) == list(config.items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        run.output, quantization_config=UNPACKED
    )
    assert_perplexity(loaded, run)
    # The key that says the type is the one that was there.
    changed = drive(copied, "--dtype", "bfloat16").succeeded().config()
    assert changed.pop("torch_dtype") == "bfloat16"
    assert "dtype" not in changed


# ---- Shards ----


def sharded(folder: Path, size: str = "100KB") -> Path:
    model = unusual.llama()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    return folder


def shards_of(folder: Path) -> dict[str, set[str]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[path.name] = set(file.keys())
    return found


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_shards_are_the_models(copied: Path, drive: Driver) -> None:
    sharded(copied)
    index = copied / "model.safetensors.index.json"
    edit(index, metadata={"total_parameters": 5, "note": "x", "total_size": 1})
    run = drive(copied).succeeded()
    before, after = shards_of(copied), shards_of(run.output)
    assert len(before) > 3
    assert before.keys() == after.keys()
    for file, names in before.items():
        modules = {name.rpartition(".")[0] for name in names}
        assert {name.rpartition(".")[0] for name in after[file]} == modules
    found = index_of(run.output)
    assert found["weight_map"] == {
        name: file for file, names in after.items() for name in sorted(names)
    }
    size = sum(len(bytes_of(tensor)) for tensor in run.tensors().values())
    assert found["metadata"] == {"total_parameters": 5, "note": "x", "total_size": size}
    assert run.report()["tensor_bytes"] == size
    one = drive(save_whole(copied, copied.parent / "whole"))
    ours, theirs = run.tensors(), one.succeeded().tensors()
    assert ours.keys() == theirs.keys()
    assert all(bytes_of(ours[name]) == bytes_of(theirs[name]) for name in ours)


def save_whole(shards: Path, folder: Path) -> Path:
    """The same model in one file."""
    shutil.copytree(shards, folder)
    tensors = unpack.tensors_of(folder)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["names", "backwards", "folder", "links", "stale"])
def test_shards_of_other_makes(kind: str, copied: Path, drive: Driver) -> None:
    sharded(copied, "60KB" if kind == "backwards" else "200KB")
    index = copied / "model.safetensors.index.json"
    content = index_of(copied)
    if kind == "names":
        for number, file in enumerate(sorted(set(content["weight_map"].values()))):
            (copied / file).rename(copied / f"Part {number}é.safetensors")
            for name, own in content["weight_map"].items():
                if own == file:
                    content["weight_map"][name] = f"Part {number}é.safetensors"
    elif kind == "backwards":
        content["weight_map"] = dict(reversed(content["weight_map"].items()))
    elif kind == "folder":
        (copied / "weights").mkdir()
        for file in set(content["weight_map"].values()):
            (copied / file).rename(copied / "weights" / file)
        content["weight_map"] = {
            name: f"weights/{file}" for name, file in content["weight_map"].items()
        }
    elif kind == "links":
        blobs = copied.parent / "blobs"
        blobs.mkdir()
        for number, path in enumerate(sorted(copied.iterdir())):
            path.rename(blobs / f"{number:064}")
            path.symlink_to(Path("..") / "blobs" / f"{number:064}")
    elif kind == "stale":
        # Loaders take the whole file.
        save_file(unusual.llama().state_dict(), copied / "model.safetensors", {"format": "pt"})
        for path in copied.glob("model-*.safetensors"):
            path.write_bytes(b"")
    if kind != "links":
        index.write_text(json.dumps(content), encoding="utf-8")
    run = drive.evaluated(copied).succeeded()
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        run.output, quantization_config=UNPACKED, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert_perplexity(loaded, run)
    assert not any(path.is_symlink() for path in run.output.rglob("*"))


@pytest.mark.parametrize("kind", ["whole", "sharded", "legacy", "parameters", "strided"])
def test_files_of_pytorch(kind: str, copied: Path, drive: Driver) -> None:
    tensors: dict[str, Any] = unpack.tensors_of(copied)
    (copied / "model.safetensors").unlink()
    if kind == "parameters":
        tensors = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    elif kind == "strided":
        # One storage, of which two tensors are parts, and a transposed one.
        both = torch.stack([tensors[UP], tensors[UP.replace("up", "gate")]])
        tensors |= {UP: both[0], UP.replace("up", "gate"): both[1]}
        down = UP.replace("up", "down")
        tensors[down] = tensors[down].t().contiguous().t()
    if kind == "sharded":
        names = sorted(tensors)
        files = {name: f"pytorch_model-{1 + (name > names[9])}.bin" for name in names}
        for file in set(files.values()):
            torch.save(
                {name: tensors[name] for name in names if files[name] == file}, copied / file
            )
        index = {"metadata": {}, "weight_map": files}
        (copied / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(
            tensors,
            copied / "pytorch_model.bin",
            _use_new_zipfile_serialization=kind != "legacy",
        )
    run = drive.evaluated(copied).succeeded()
    assert not list(run.output.glob("pytorch_model*"))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        run.output, quantization_config=UNPACKED, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert_perplexity(loaded, run)
    kept = unpack.tensors_of(run.output)
    assert kept[NORM].equal(tensors[NORM])


# ---- Damage ----


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def lose_shard(folder: Path) -> None:
    sorted(sharded(folder).glob("*.safetensors"))[1].unlink()


def lie(folder: Path) -> None:
    sharded(folder)
    content = index_of(folder)
    first, *_, last = sorted(set(content["weight_map"].values()))
    assert first != last
    content["weight_map"]["model.norm.weight"] = first
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def without_weights(content: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return damage


def index_alone(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def make_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def lose(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
K = "model.layers.1.self_attn.k_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a shard is missing": (lose_shard, ("model-00002-of-", "is missing")),
    "an index lies": (lie, ("index.json", "model.norm.weight")),
    "truncated": (truncate, ("model.safetensors", "interrupted")),
    "empty": (write("model.safetensors", b""), ("model.safetensors", "0 bytes")),
    "a pointer": (write("model.safetensors", POINTER), ("model.safetensors", "git-lfs")),
    "a folder": (make_folder, ("model.safetensors",)),
    "an index is broken": (index_alone("{"), ("index.json", "weight_map")),
    "an index has no map": (index_alone("{}"), ("index.json", "weight_map")),
    "an index is a list": (index_alone("[]"), ("index.json", "weight_map")),
    "an index without metadata": (index_alone('{"weight_map": {}}'), ("index.json", "metadata")),
    "an index names nothing": (
        index_alone('{"metadata": {}, "weight_map": {}}'),
        ("has no tensor for",),
    ),
    "an index names numbers": (
        index_alone('{"metadata": {}, "weight_map": {"a": 1}}'),
        ("index.json",),
    ),
    "a linear is missing": (drop(K), (K,)),
    "a norm is missing": (drop("model.norm.weight"), ("model.norm.weight",)),
    "another shape": (put(K, torch.ones(32, 65)), (K, "[32, 64]", "[32, 65]")),
    "a flat linear": (put(K, torch.ones(32 * 64)), (K, "[2048]")),
    "whole numbers": (put(K, torch.ones(32, 64, dtype=torch.int8)), (K, "I8")),
    "a norm of whole numbers": (
        put("model.norm.weight", torch.ones(64, dtype=torch.int32)),
        ("model.norm.weight", "I32"),
    ),
    "an embedding of another size": (
        put("model.embed_tokens.weight", torch.ones(100, 64)),
        ("model.embed_tokens.weight", "[160, 64]", "[100, 64]"),
    ),
    "no configuration": (lose("config.json"), ("config.json",)),
    "a broken configuration": (write("config.json", "{"), ("config.json",)),
    "a configuration that is a list": (write("config.json", "[]"), ("config.json", "list")),
    "a configuration that is no text": (write("config.json", b"\xff\xfe\x00"), ("config.json",)),
    "a configuration of nothing": (write("config.json", "{}"), ("config.json",)),
    "an unknown model": (
        lambda folder: edit(folder / "config.json", model_type="mine", architectures=["Mine"]),
        ("mine",),
    ),
    "an odd size": (
        lambda folder: edit(folder / "config.json", hidden_size="wide"),
        ("config.json",),
    ),
    "a wrong size": (lambda folder: edit(folder / "config.json", hidden_size=72), ("[", "72")),
    "no layers": (lambda folder: edit(folder / "config.json", num_hidden_layers=0), ("layers",)),
    "no tokenizer": (lose("tokenizer.json", "tokenizer_config.json"), ("tokenizer",)),
    "a broken tokenizer": (write("tokenizer.json", "{"), ("tokenizer",)),
    "a pickle of a list": (without_weights([1, 2]), ("pytorch_model.bin", "list")),
    "a pickle of a pickle": (
        without_weights({"state_dict": {"a": torch.ones(1)}}),
        ("pytorch_model.bin", "state_dict"),
    ),
    "a pickle of code": (without_weights({"a": Path("x")}), ("pytorch_model.bin",)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(kind: str, copied: Path, drive: Driver) -> None:
    damage, words = DAMAGES[kind]
    damage(copied)
    drive(copied).refused(*words)


def test_an_empty_folder(tmp_path: Path, drive: Driver) -> None:
    (tmp_path / "empty").mkdir()
    drive(tmp_path / "empty").refused(str(tmp_path / "empty" / "config.json"))


# ---- The folder ----


def digest(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("where", ["same", "inside", "link", "dots"])
def test_the_float_model_is_not_written_over(
    where: str, copied: Path, tmp_path: Path, drive: Driver
) -> None:
    before = digest(copied)
    (tmp_path / "link").symlink_to(copied)
    output = {
        "same": copied,
        "inside": copied / "deep" / "er",
        "link": tmp_path / "link" / "quantized",
        "dots": copied / ".." / copied.name,
    }[where]
    run = drive(copied, "--restart", output=output)
    assert run.status == 2
    assert "outside the model's" in run.err
    assert digest(copied) == before
    # And the other way round: a model given by a link.
    assert drive(tmp_path / "link", output=copied).status == 2
    assert digest(copied) == before


def test_another_model_is_not_written_over(
    llama: Path, copied: Path, drive: Driver, tmp_path: Path
) -> None:
    before = digest(copied)
    for flags in ((), ("--restart",)):
        run = drive(llama, *flags, output=copied)
        assert run.status == 2
        assert "holds a model" in run.err
        assert digest(copied) == before
    # Files that nobody would miss a model for do not matter.
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    drive(llama, output=other).succeeded()
    assert (other / "notes.txt").read_text() == "mine"


def test_an_output_that_cannot_be(llama: Path, drive: Driver, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = drive(llama, output=tmp_path / "file")
    assert run.status == 2
    assert "got the file" in run.err
    run = drive(llama, output=tmp_path / "file" / "below")
    assert run.status == 2
    assert str(tmp_path / "file" / "below") in run.err
    assert run.err.count("\n") == 1


def test_a_restart_leaves_nothing_of_another_checkpoint(
    llama: Path, copied: Path, drive: Driver
) -> None:
    """Loaders take a whole file before shards."""
    run = drive(llama).succeeded()
    sharded(copied)
    again = drive(copied, "--restart", "--bits", 8, output=run.output).succeeded()
    assert shards_of(again.output).keys() == shards_of(copied).keys()
    once_more = drive(llama, "--restart", "--format", "dense-f32", output=run.output).succeeded()
    assert list(shards_of(once_more.output)) == ["model.safetensors"]
    assert not (run.output / "model.safetensors.index.json").exists()


def test_a_dry_run_writes_nothing(llama: Path, drive: Driver, server: Any) -> None:  # noqa: ANN401
    before = server.metrics().sum("certiq_jobs_total"), digest(llama)
    run = drive(llama, "--dry-run", "--server", "127.0.0.1:1").succeeded()
    assert not run.output.exists()
    assert "model.layers.*.self_attn.q_proj: 2 of [64, 64], optq 4 bits" in run.out
    assert "100.0 % of the layers' weights are quantized" in run.out
    assert "lm_head: 1 stay float: outside model.layers" in run.out
    assert (server.metrics().sum("certiq_jobs_total"), digest(llama)) == before


def test_the_least_share(llama: Path, drive: Driver) -> None:
    gate = 96 * 64 * 3 / (96 * 64 * 3 + 64 * 64 * 2 + 32 * 64 * 2)
    flags = ["--format", "compressed-tensors", "--layers", 2]
    drive(llama, *flags, "--min-share", 1, "--dry-run").succeeded()
    # Nobody counts what was to be ignored.
    drive(llama, *flags, "--min-share", 1, "--ignore", "self_attn", "--dry-run").succeeded()
    drive(llama, *flags, "--min-share", 1.5).refused("min_share", "0 to 1")
    assert 0.5 < gate < 1


def test_a_share_below_the_least(save: Save, drive: Driver) -> None:
    source = save(unusual.gpt_oss())
    drive(source, "--min-share", 0.5).refused(
        "--min-share", "50 %", "experts", "a dense format quantizes them"
    )
    drive(source, "--min-share", 0.9, "--format", "dense-f16", "--dry-run").succeeded()
