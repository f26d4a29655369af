"""Reports: measurements against computations on whole models, plans against what happened."""

import math
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import driving
import pytest
import torch
import transformers
import unpack
import unusual
from certiq.torch.sums import held_out_hash, is_held_out_block
from driving import Driver, Outcome, bytes_of

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ANN401
    """Nobody changes it. Its sizes are no multiples of much."""
    model = unusual.llama(intermediate_size=104)
    return unusual.saver(tokenizer, tmp_path_factory.mktemp("llama"))(model)


# ---- Measurements ----


@torch.no_grad()
def measured(windows: torch.Tensor, float_model: Any, model: Any) -> dict[str, float]:  # noqa: ANN401
    """By the definitions, in float64."""
    following = windows[:, 1:].reshape(-1)
    logs = [
        own(input_ids=windows).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)
        for own in (float_model, model)
    ]
    before, after = logs
    first = [own.argmax(-1) for own in logs]
    right = [own == following for own in first]
    at = torch.arange(len(following))
    return {
        "float": math.exp(-float(before[at, following].mean())),
        "quantized": math.exp(-float(after[at, following].mean())),
        "kl_divergence": float((before.exp() * (before - after)).sum(-1).mean()),
        "top1_agreement": float((first[0] == first[1]).double().mean()),
        "flips": float((right[0] != right[1]).double().mean()),
        "tokens": len(following),
        "window": windows.shape[1],
    }


def assert_measured(found: dict[str, Any], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Of two tokens that are as likely as can be, another may come first in float32.
        slack = 2 / expected["tokens"] if name in ("top1_agreement", "flips") else 0
        assert found[name] == pytest.approx(value, rel=1e-4, abs=slack), name


@pytest.mark.parametrize("make", [unusual.llama, unusual.gemma4, unusual.deepseek])
def test_agreement_with_the_float_model(make: Callable[[], Any], save: Save, drive: Driver) -> None:
    model = make()
    run = drive.evaluated(
        save(model), "--bits", 3, "--format", "dense-f32", "--held-out-fraction", 0.25
    ).succeeded()
    loaded = type(model).from_pretrained(run.output)
    words = [int(word[1:]) for word in run.text.read_text().split()]
    evaluated = torch.tensor(words[: driving.EVALUATED_TOKENS]).reshape(-1, driving.WINDOW)
    report = run.report()
    assert_measured(report["perplexity"], measured(evaluated, model, loaded))
    assert report["evaluation"]["evaluation"] == report["perplexity"]
    # Sequences are evenly spaced; the server's rule says which ones no fit sees.
    starts = [index * (len(words) - 32) // 7 for index in range(8)]
    sequences = torch.tensor([words[start : start + 32] for start in starts])
    stream = held_out_hash("calibration")
    unseen = [row for row in range(8) if is_held_out_block(stream, row, 0.25)]
    assert 0 < len(unseen) < 8
    assert_measured(
        report["evaluation"]["held_out_calibration"],
        measured(sequences[unseen], model, loaded),
    )
    certificates = [linear["certificate"] for linear in report["linears"]]
    assert any(int(own["held_out_tokens"]) == 32 * len(unseen) for own in certificates)
    summary = run.out.splitlines()
    assert any(line.startswith("perplexity on evaluation: ") for line in summary)
    assert any(line.startswith("perplexity on held out calibration: ") for line in summary)


def test_without_the_float_model(llama: Path, drive: Driver) -> None:
    run = drive.evaluated(llama, "--no-float-evaluation", "--format", "dense-f32").succeeded()
    found = run.report()["perplexity"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run.output)
    assert found["float"] is None
    assert "kl_divergence" not in found
    assert found["quantized"] == pytest.approx(driving.perplexity(loaded, run.text), rel=1e-4)


def test_what_a_report_says_of_its_making(llama: Path, drive: Driver) -> None:
    report = drive(llama).succeeded().report()
    assert report["versions"]["torch"] == version("torch")
    assert report["versions"]["transformers"] == version("transformers")
    assert report["float_model"].startswith("equal to transformers' own to ")
    assert report["peak_memory_bytes"] > 2**20
    assert report["seconds"] > 0
    assert report["perplexity"] is None


# ---- Plans ----


def assert_happened(run: Outcome, source: Path) -> None:
    """What was planned is what the files have."""
    report = run.succeeded().report()
    plan, linears = report["plan"], report["linears"]
    before, after = unpack.tensors_of(source), run.tensors()
    replaced = before.keys() - after.keys()
    changed = {
        name
        for name in before.keys() & after.keys()
        if before[name].dtype != after[name].dtype or not before[name].equal(after[name])
    }
    made = (after.keys() - before.keys()) | changed
    assert plan["predicted_bytes"] == sum(len(bytes_of(after[name])) for name in made)
    assert report["tensor_bytes"] == sum(len(bytes_of(tensor)) for tensor in after.values())
    weights = sum(before[name].numel() for name in replaced | changed)
    assert sum(linear["weights"] for linear in linears) == weights
    assert f"{100 * plan['share_quantized']:.1f} % of the layers' weights" in run.out
    # Of the matrices in the layers, each is quantized or said to stay.
    stays = plan["stay_float"]
    asked = [name for name, reason in stays.items() if reason in ("ignored", "behind --layers")]
    total = 0
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if tensor.dim() < 2 or not re.search(r"\.(layers|blocks)\.", name) or "conv" in name:
            continue
        if name.endswith("bias"):
            continue
        # A tensor of all experts is said by its linears.
        fused = module if name != module or tensor.dim() == 2 else module.rpartition(".")[0]
        said = [own for own in stays if own == fused or own.startswith(f"{fused}.")]
        assert bool(said) == (name not in replaced | changed), name
        if not any(own in asked for own in said):
            total += tensor.numel()
    assert plan["share_quantized"] == pytest.approx(weights / total)


@pytest.mark.parametrize(
    "flags",
    [
        ("--bits", 3),
        ("--bits", 5, "--asymmetric"),
        ("--bits", 2, "--group-size", 8, "--asymmetric"),
        ("--bits", 8, "--group-size", 8, "--dtype", "bfloat16"),
        ("--bits", 4, "--format", "gptq", "--group-size", 8),
        ("--bits", 4, "--format", "gptq-v2", "--asymmetric"),
        ("--bits", 8, "--format", "gptq"),
        ("--format", "dense-f16"),
        ("--layers", 1, "--ignore", "up_proj"),
    ],
    ids=lambda flags: "".join(map(str, flags)),
)
def test_plans_of_linears(flags: tuple[object, ...], llama: Path, drive: Driver) -> None:
    run = drive(llama, *flags)
    if "--dtype" in flags:
        # All tensors change: what the linears take is what was planned for them.
        tensors = run.succeeded().tensors()
        roles = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        own = [tensor for name, tensor in tensors.items() if name.endswith(roles)]
        predicted = run.report()["plan"]["predicted_bytes"]
        assert predicted == sum(len(bytes_of(tensor)) for tensor in own)
        return
    assert_happened(run, llama)


PLANNED = [
    pytest.param(unusual.qwen3_moe, "compressed-tensors", marks=pytest.mark.slow),
    (unusual.mixtral, "gptq"),
    (unusual.deepseek, "compressed-tensors"),
    (unusual.gpt_oss, "compressed-tensors"),
    pytest.param(unusual.gpt_oss, "dense-f16", marks=pytest.mark.slow),
    pytest.param(unusual.llama4, "compressed-tensors", marks=pytest.mark.slow),
    (unusual.granite_moe, "dense-bf16"),
    (unusual.gemma4, "compressed-tensors"),
    pytest.param(unusual.bamba, "compressed-tensors", marks=pytest.mark.slow),
    pytest.param(unusual.rwkv, "compressed-tensors", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("make", "format"), PLANNED, ids=lambda value: getattr(value, "__name__", value)
)
def test_plans_of_models(make: Callable[[], Any], format: str, save: Save, drive: Driver) -> None:
    source = save(make())
    assert_happened(drive(source, "--format", format), source)


@pytest.mark.parametrize(
    ("make", "flags", "words"),
    [
        (unusual.llama, ("--group-size", 48), ("down_proj", "mlp.gate_proj", "48", "64 features")),
        (
            lambda: unusual.llama(intermediate_size=112),
            ("--group-size", 64),
            ("model.layers.*.mlp.down_proj [64, 112]", "--ignore 'down_proj$'"),
        ),
        (
            lambda: unusual.llama(intermediate_size=112),
            ("--group-size", 64, "--format", "gptq"),
            ("model.layers.*.mlp.down_proj [64, 112]",),
        ),
        (
            lambda: unusual.llama(intermediate_size=100),
            ("--format", "gptq", "--bits", 2),
            ("gate_proj", "words of 32"),
        ),
    ],
    ids=str,
)
def test_what_a_format_cannot_hold_is_said_before_the_work(
    make: Callable[[], Any],
    flags: tuple[object, ...],
    words: tuple[str, ...],
    save: Save,
    drive: Driver,
    server: Any,  # noqa: ANN401
) -> None:
    before = server.metrics().sum("certiq_jobs_total")
    run = drive(save(make()), *flags)
    if flags == ("--group-size", 48):
        words = ("gate_proj", "48", "64 features")
    run.refused(*words)
    assert not run.output.exists()
    assert server.metrics().sum("certiq_jobs_total") == before
