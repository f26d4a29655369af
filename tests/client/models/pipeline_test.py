"""certiq-quantize-model on small models: every kind, every format, what loads, what is reported."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certiq
import certiq.torch
import models
import numpy as np
import pytest
import torch
import transformers
import unpack
from certiq.model.cli import main
from programs import Server

Quantize = Callable[..., tuple[Path, dict[str, Any]]]
UNPACKED = transformers.CompressedTensorsConfig(dequantize=True)
CALIBRATION = ["--sequences", "24", "--sequence-length", "64", "--quiet"]


@pytest.fixture
def quantize(server: Server, text: Path, tokenizer: Any, tmp_path: Path) -> Quantize:  # noqa: ANN401
    """Saves a model, runs the command on it, returns the output and its report."""

    def run(model: Any, *flags: str) -> tuple[Path, dict[str, Any]]:  # noqa: ANN401
        source = models.save(model, tokenizer, tmp_path / "source")
        output = tmp_path / "output"
        status = main(
            [
                *("--model", str(source), "--calibration", str(text), "--output", str(output)),
                *("--server", server.address, *CALIBRATION, *flags),
            ]
        )
        assert status == 0
        return output, json.loads((output / "report.json").read_text())

    return run


def with_weights(model: Any, weights: dict[str, np.ndarray]) -> Any:  # noqa: ANN401
    """The model with these linears' weights [N, K]."""
    for name, weight in weights.items():
        certiq.torch.set_weight(model.get_submodule(name), torch.from_numpy(weight))
    return model


@torch.no_grad()
def logits(model: Any, seed: int = 5) -> torch.Tensor:  # noqa: ANN401
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, models.VOCABULARY, (2, 40), generator=made)
    output = model(input_ids=ids)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).float()


def names_of(report: dict[str, Any]) -> list[str]:
    return [linear["name"] for linear in report["linears"]]


@pytest.mark.parametrize(
    ("bits", "flags"),
    [
        (4, ["--group-size", "32"]),
        (4, ["--group-size", "32", "--asymmetric"]),
        (8, []),
        (2, ["--group-size", "16", "--asymmetric"]),
        (3, ["--group-size", "32"]),
        (5, []),
        (6, ["--asymmetric"]),
        (7, ["--group-size", "32", "--asymmetric"]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "_".join(value) or "channel",
)
def test_compressed_tensors_loads_in_transformers(
    bits: int, flags: list[str], quantize: Quantize
) -> None:
    output, report = quantize(models.make("llama"), "--bits", str(bits), *flags)
    tensors = unpack.tensors_of(output)
    weights = {name: unpack.compressed(tensors, name, bits) for name in names_of(report)}
    expected = logits(with_weights(models.make("llama"), weights))
    # compressed-tensors 0.20 does not make room for packed zero points: transformers unpacks then.
    options = {"quantization_config": UNPACKED} if "--asymmetric" in flags else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output, **options)
    if not options:
        assert loaded.config.quantization_config.quant_method == "compressed-tensors"
    # float32 both: sums in another order at most.
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    assert not torch.allclose(logits(models.make("llama")), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_keep_their_type(dtype: str, quantize: Quantize) -> None:
    model = models.make("qwen3").to(getattr(torch, dtype))
    output, report = quantize(model, "--group-size", "32")
    tensors = unpack.tensors_of(output)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {
        f"torch.{dtype}",
        "torch.int32",
        "torch.int64",
    }
    weights = {name: unpack.compressed(tensors, name, 4) for name in names_of(report)}
    expected = logits(with_weights(models.make("qwen3").to(model.dtype), weights))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert loaded.dtype == model.dtype
    # Weights are products in the half type, once rounded here and there.
    step = torch.finfo(model.dtype).eps
    assert (logits(loaded) - expected).abs().max() <= 8 * step * expected.abs().max()


@pytest.mark.parametrize(
    ("format", "bits", "flags"),
    [
        ("gptq", 4, ["--group-size", "32"]),
        ("gptq", 3, []),
        ("gptq-v2", 4, ["--group-size", "16", "--asymmetric"]),
        (
            "gptq-v2",
            8,
            ["--group-size", "32", "--group-scales", "dynamic", "--order", "decreasing_norm"],
        ),
    ],
)
def test_gptq_holds_the_quantized_model(
    format: str, bits: int, flags: list[str], quantize: Quantize, text: Path
) -> None:
    output, report = quantize(
        models.make("llama"),
        *("--format", format, "--bits", str(bits), "--evaluation", str(text)),
        *("--evaluation-tokens", "1024", "--evaluation-window", "128", *flags),
    )
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config == json.loads((output / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == format.replace("-", "_")
    assert (config["bits"], config["sym"]) == (bits, "--asymmetric" not in flags)
    assert config["desc_act"] == ("dynamic" in flags)
    tensors = unpack.tensors_of(output)
    version = 1 if format == "gptq" else 2
    weights = {name: unpack.gptq(tensors, name, bits, version=version) for name in names_of(report)}
    model = with_weights(models.make("llama"), weights)
    # The report's perplexity, block by block, is that of the whole models.
    ids = [int(word[1:]) for word in text.read_text().split()[:1024]]
    windows = torch.tensor(ids).reshape(-1, 128)
    for name, measured in (("float", models.make("llama")), ("quantized", model)):
        with torch.no_grad():
            found = measured(input_ids=windows, labels=windows).loss.item()
        assert report["perplexity"][name] == pytest.approx(math.exp(found), rel=1e-4)


KINDS = [
    *(("mistral", "compressed_tensors"), ("qwen3", "compressed_tensors")),
    *(("opt", "compressed_tensors"), ("bert", "compressed_tensors")),
    *(("gpt2", "gptq"), ("mistral", "dense_f16"), ("gpt2", "dense_f32")),
]


@pytest.mark.parametrize(("name", "format"), KINDS)
def test_every_kind_of_model(name: str, format: str, quantize: Quantize) -> None:
    output, report = quantize(
        models.make(name), "--format", format.replace("_", "-"), "--method", "qronos"
    )
    linears = names_of(report)
    assert len(linears) == 2 * {"gpt2": 4, "opt": 6, "bert": 6}.get(name, 7)
    tensors = unpack.tensors_of(output)
    kind = type(models.make(name))
    if format == "gptq":
        weights = {own: unpack.gptq(tensors, own, 4, version=1) for own in linears}
        assert tensors["transformer.h.0.attn.c_attn.qweight"].shape == (64 * 4 // 32, 192)
        found = logits(with_weights(models.make(name), weights))
    elif format == "compressed_tensors":
        weights = {own: unpack.compressed(tensors, own, 4) for own in linears}
        loaded = kind.from_pretrained(output)
        found = logits(loaded)
        assert torch.allclose(found, logits(with_weights(models.make(name), weights)), atol=2e-5)
    else:
        found = logits(kind.from_pretrained(output))
    original = logits(models.make(name))
    difference = (found - original).norm() / original.norm()
    assert 0 < difference < 0.4
    for linear in report["linears"]:
        assert 0 < linear["relative_error"] <= linear["relative_bound"]
        assert 0 < linear["held_out_relative_error"] < 1


def test_experts_with_few_tokens_or_none_are_named(quantize: Quantize) -> None:
    model = models.make("mixtral")
    never, _ = models.starve_experts(model)
    expected_names = set()
    output, report = quantize(model, "--method", "qronos", "--group-size", "32")
    by_name = {linear["name"]: linear for linear in report["linears"]}
    assert len(by_name) == 2 * (4 + 8 * 3)
    for layer in range(2):
        for projection in ("gate", "up", "down"):
            name = f"model.layers.{layer}.mlp.experts.{never}.{projection}_proj"
            expected_names.add(name)
            # It has the sums of the other experts.
            own = by_name[name]
            assert own["certificate"]["method"] == "METHOD_OPTQ"
            assert own["routed_tokens"] == 0
            assert own["tokens"] == own["prior_tokens"] > 0
            assert any("saw 0 tokens" in note for note in own["notes"])
            assert 0.01 < own["relative_error"] < 0.2
    experts = [name for name in by_name if ".experts." in name]
    assert expected_names < set(experts)
    few = [name for name in experts if any("damping" in note for note in by_name[name]["notes"])]
    for name in experts:
        features = int(by_name[name]["certificate"]["features"])
        own = by_name[name]
        assert (name in few) == (own["routed_tokens"] < features)
        # Half a token a feature, which is nothing beside sixteen.
        assert own["prior_tokens"] == (features // 2 if own["routed_tokens"] < 16 * features else 0)
        assert own["tokens"] == own["routed_tokens"] + own["prior_tokens"]
    coverage = report["totals"]["experts"]
    assert coverage["linears"] == len(experts)
    assert coverage["without_tokens"] == 6
    assert set(report["totals"]["with_notes"]) == set(experts)
    html = (output / "report.html").read_text()
    assert "saw 0 tokens" in html
    # Under the names that checkpoints of this kind have.
    tensors = unpack.tensors_of(output)
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight_packed" in tensors
    assert "model.layers.1.block_sparse_moe.gate.weight" in tensors
    assert not any(name.endswith("experts.3.w1.weight") for name in tensors)

    apart = models.make("mixtral")
    models.starve_experts(apart)
    certiq.torch.take_experts_apart(apart)
    packed = {"gate": "w1", "up": "w3", "down": "w2"}
    weights = {}
    for name in by_name:
        stored = name
        if ".experts." in name:
            head, _, projection = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
            stored = f"{head}.{packed[projection.removesuffix('_proj')]}"
        weights[name] = unpack.compressed(tensors, stored, 4)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output, quantization_config=UNPACKED)
    assert torch.allclose(logits(loaded), logits(with_weights(apart, weights)), atol=1e-5)


def test_nothing_is_computed_that_nobody_reads(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[tuple[int, int]] = Counter()
    forward = torch.nn.Linear.forward

    def counted(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls[module.in_features, module.out_features] += 1
        return forward(module, x)

    model = models.make("llama")
    config = model.config
    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    quantize(model, "--no-load-checks")
    batches = 3
    # Each batch once, and a short sequence that shows which linears share an input.
    down = (config.intermediate_size, config.hidden_size)
    assert calls[down] == (batches + 1) * config.num_hidden_layers
    assert calls[config.hidden_size, models.VOCABULARY] == 1


def test_report_speaks_of_every_linear(quantize: Quantize) -> None:
    output, report = quantize(models.make("llama"), "--damping", "held_out", "--ignore", "v_proj")
    assert len(report["linears"]) == 12
    assert "model.layers.0.self_attn.v_proj" in report["left_float"]
    assert "lm_head" in report["left_float"]
    totals = report["totals"]
    assert totals["linears"] == 12
    assert [text.split()[0] for text in report["loads_in"]] == [
        "compressed-tensors",
        "transformers",
        "vLLM",
    ]
    assert totals["weights"] == sum(linear["weights"] for linear in report["linears"])
    html = (output / "report.html").read_text()
    for linear in report["linears"]:
        assert linear["name"] in html
        assert len(linear["certificate"]["ladder"]) == 6
        assert linear["lambda_used"] > 0
    worst = max(report["linears"], key=lambda linear: linear["relative_error"])
    assert totals["worst"][0] == worst["name"]
    assert not list(output.glob(".*"))
    assert not (output / "unfinished").exists()
    transformers.AutoModelForCausalLM.from_pretrained(output)


def test_qronos_corrects_what_earlier_layers_left(quantize: Quantize, tmp_path: Path) -> None:
    """At 3 bits: outputs nearer to the float model's than OPTQ's, on tokens of the calibration."""
    model = models.make("llama", seed=3)
    expected = {}
    for method in ("optq", "qronos"):
        output, report = quantize(
            models.make("llama", seed=3),
            *("--method", method, "--bits", "3", "--format", "dense-f32"),
            *(["--damping", "relative_trace:0.01", "--restart"]),
        )
        loaded = transformers.AutoModelForCausalLM.from_pretrained(output)
        expected[method] = (logits(loaded) - logits(model)).norm().item()
        by_name = {linear["name"]: linear for linear in report["linears"]}
        certificate = by_name["model.layers.1.mlp.down_proj"]["certificate"]
        if method == "qronos":
            assert certificate["qronos_initial"] < certificate["optq_initial"]
    assert expected["qronos"] < expected["optq"]


# Whether held-out tokens choose the damping; trials; passes of polish.
PRESETS = {"fast": (False, 0, 0), "balanced": (True, 0, 0), "best": (True, 5, 2)}


@pytest.mark.parametrize("quality", PRESETS)
def test_presets_reach_the_server(quality: str, quantize: Quantize) -> None:
    _, report = quantize(models.make("llama"), "--quality", quality, "--bits", "2")
    chosen, trials, polish = PRESETS[quality]
    for linear in report["linears"]:
        certificate = linear["certificate"]
        spec = certificate["spec"]
        assert spec["quality"] == f"QUALITY_{quality.upper()}"
        assert spec["order"] == "ORDER_DECREASING_NORM"
        assert spec["scale"] == "SCALE_RULE_COMPENSATED"
        assert bool(certificate["ladder"]) == chosen
        assert ("held_out_relative_error" in certificate) == chosen
        assert max(1, trials) == max(1, spec.get("scale_trials", 0))
        assert polish == spec.get("polish", 0)


def test_what_is_given_wins_over_the_preset(quantize: Quantize) -> None:
    _, report = quantize(
        models.make("llama"),
        *("--quality", "best", "--damping", "relative_trace:0.05", "--polish", "0"),
        *("--scale", "piso", "--scale-objective", "data_free"),
    )
    for linear in report["linears"]:
        certificate = linear["certificate"]
        assert certificate["spec"]["scale"] == "SCALE_RULE_PISO"
        assert certificate["spec"]["scale_objective"] == "SCALE_OBJECTIVE_DATA_FREE"
        assert certificate["ladder"] == []
        assert "held_out_relative_error" not in certificate


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_states_on_disk_change_nothing(name: str, quantize: Quantize, text: Path) -> None:
    outputs = []
    for memory in ("16", "0"):
        output, _ = quantize(
            models.make(name),
            *("--method", "qronos", "--state-memory", memory, "--restart"),
            *("--evaluation", str(text), "--evaluation-tokens", "512"),
            *("--evaluation-window", "64"),
        )
        outputs.append(unpack.tensors_of(output))
    first, second = outputs
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert second[key].equal(tensor), key


def without_calling(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A gated MLP that reads a weight and does not call its linear."""
    inner = module.act_fn(module.gate_proj(x)) * module.up_proj(x)
    return torch.nn.functional.linear(inner, module.down_proj.weight)


def test_a_weight_that_is_read_without_calling_its_linear(
    server: Server,
    text: Path,
    tokenizer: Any,  # noqa: ANN401
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaMLP, "forward", without_calling
    )
    source = models.save(models.make("llama"), tokenizer, tmp_path / "source")
    flags = [
        *("--model", str(source), "--calibration", str(text), "--output", str(tmp_path / "output")),
        *("--server", server.address, *CALIBRATION),
    ]
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert "model.layers.0.mlp.down_proj: its weight is read without calling the linear" in said
    assert main([*flags, "--ignore", "down_proj$"]) == 0


def test_a_linear_that_nothing_calls(quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    def skipping(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module.down_proj(module.act_fn(module.gate_proj(x)))

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", skipping)
    _, report = quantize(models.make("llama"))
    for linear in report["linears"]:
        uncalled = linear["name"].endswith("up_proj")
        assert any("nothing called it" in note for note in linear["notes"]) == uncalled
        assert (linear["certificate"]["method"] == "METHOD_NEAREST") == uncalled


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_devices_divide_the_sequences(name: str, quantize: Quantize, text: Path) -> None:
    evaluation = ("--evaluation", str(text), "--evaluation-tokens", "512")
    results = []
    for device in ("cpu", "cpu,cpu", "cpu,cpu,cpu"):
        output, report = quantize(
            models.make(name),
            *("--method", "qronos", "--device", device, "--restart", *evaluation),
            *("--evaluation-window", "64"),
        )
        assert report["settings"]["device"] == device
        results.append((unpack.tensors_of(output), report["evaluation"]))
    for tensors, evaluation_of in results[1:]:
        assert evaluation_of == results[0][1]
        for key, tensor in results[0][0].items():
            assert tensors[key].equal(tensor), key


def test_a_device_that_is_none(
    server: Server, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for device in ("gpu", "cpu,", "cuda:99"):
        status = main(
            [
                *("--model", str(tmp_path / "model"), "--calibration", str(text)),
                *("--device", device),
                *("--output", str(tmp_path / "output"), "--server", server.address),
            ]
        )
        assert status == 2
        assert f"got {device!r}" in capsys.readouterr().err
