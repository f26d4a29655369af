"""Models run as they run: what blocks hand on, texts, recipes, interruptions, full disks."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import driving
import models
import pytest
import torch
import transformers
import unpack
import unusual
from certiq.model.run import ModelRun
from driving import Driver, Outcome, edit, rewrite
from programs import Server
from text_test import TEMPLATE
from tokenizers import processors

Save = Callable[..., Path]
UNPACKED = transformers.CompressedTensorsConfig(dequantize=True)


def jobs_of(server: Server) -> float:
    return server.metrics().sum("certiq_jobs_total")


# ---- What blocks hand on ----


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (unusual.gemma4, "optq"),
        (unusual.gemma4, "qronos"),
        (unusual.bamba, "optq"),
        (unusual.rwkv, "optq"),
        pytest.param(unusual.bamba, "qronos", marks=pytest.mark.slow),
        pytest.param(unusual.rwkv, "qronos", marks=pytest.mark.slow),
        pytest.param(unusual.zamba2, "optq", marks=pytest.mark.slow),
        pytest.param(unusual.zamba2, "qronos", marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_models_run_as_transformers_runs_them(
    make: Callable[[], Any], method: str, save: Save, drive: Driver
) -> None:
    """Keys and values of earlier layers, inputs of each layer, blocks that return tuples, blocks
    that are the same module. Batches of one size, which nothing can tell apart by shape."""
    model = make()
    source = save(model)
    run = drive.evaluated(
        source, "--format", "dense-f32", "--method", method, "--batch-size", 2
    ).succeeded()
    found = run.report()["perplexity"]
    assert found["float"] == pytest.approx(driving.perplexity(model, run.text), rel=1e-4)
    loaded, info = type(model).from_pretrained(run.output, output_loading_info=True)
    assert not info["missing_keys"]
    assert found["quantized"] == pytest.approx(driving.perplexity(loaded, run.text), rel=1e-4)
    assert found["kl_divergence"] > 1e-4
    assert "equal to transformers' own" in run.report()["float_model"]


E: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SEEN: dict[str, Any] = {**E, "image_size": 32, "patch_size": 8}
HALVES = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
HALVES |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
HALVES |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
OTHERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, **TOKENS},
        "is an encoder-decoder",
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {"d_model": 64, **HALVES, **TOKENS},
        "is an encoder-decoder",
    ),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": {**E, "vocab_size": 160}, "vision_config": SEEN},
        "CLIPModel",
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", SEEN, "reads pixel_values"),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {
            **E,
            "conv_dim": [32] * 2,
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        "reads input_values",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_token_ids_do_not_run(kind: str, save: Save, drive: Driver) -> None:
    config, model, settings, words = OTHERS[kind]
    torch.manual_seed(0)
    own = getattr(transformers, config)(**{"vocab_size": 160, **settings})
    source = save(getattr(transformers, model)(own))
    drive(source).refused(words)


def test_a_model_that_sees_is_quantized_where_it_reads(save: Save, drive: Driver) -> None:
    """Its picture's tower stays as it is."""
    torch.manual_seed(0)
    text = {
        **E,
        "vocab_size": 160,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    model = unusual.enlarged(transformers.Qwen2VLForConditionalGeneration(config))
    source = save(model)
    run = drive(source, "--format", "dense-f32").succeeded()
    quantized = {linear["name"] for linear in run.report()["linears"]}
    assert len(quantized) == 14
    before, after = unpack.tensors_of(source), run.tensors()
    assert before.keys() == after.keys()
    kept = [name for name in before if before[name].equal(after[name])]
    assert len(before) - len(kept) == 14
    assert any("visual" in name for name in kept)


# ---- Texts ----


def test_text_begins_as_the_tokenizer_begins_it(llama: Path, tmp_path: Path, drive: Driver) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "model"))
    own = transformers.AutoTokenizer.from_pretrained(llama)
    # No other word has it in it.
    own.bos_token = "w159"
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w159 $A", special_tokens=[("w159", 159)]
    )
    own.save_pretrained(source)
    run = drive.evaluated(source).succeeded()
    texts = run.report()["texts"]
    assert texts["calibration"]["begins_with"] == ["w159"]
    assert texts["evaluation"]["begins_with"] == ["w159"]
    words = [int(word[1:]) for word in run.text.read_text().split()]
    size = driving.WINDOW - 1
    count = driving.EVALUATED_TOKENS // size
    rows = [[159, *words[size * index : size * (index + 1)]] for index in range(count)]
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        ids = torch.tensor(rows)
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert run.report()["perplexity"]["float"] == pytest.approx(
        torch.tensor(loss).exp().item(), rel=1e-4
    )


def test_chats_lines_and_several_files(
    copied: Path, text: Path, tmp_path: Path, drive: Driver
) -> None:
    (copied / "chat_template.jinja").write_text(
        TEMPLATE.replace("bos_token", "'w1 '")
        .replace("<{{ message.role }}>", " ")
        .replace("eos_token", "' w2 '")
    )
    words = text.read_text().split()

    def some(start: int) -> str:
        return " ".join(words[start : start + 40])

    chat = tmp_path / "chat.jsonl"
    chat.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": some(80 * index)},
                        {"role": "assistant", "content": some(80 * index + 40)},
                    ]
                }
            )
            + "\r\n"
            for index in range(8)
        )
    )
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(
        b"\xef\xbb\xbf"
        + "".join(json.dumps({"text": some(40 * index)}) + "\n" for index in range(9)).encode()
    )
    run = drive(copied, "--calibration", chat, "--calibration", lines, text=text).succeeded()
    files = run.report()["texts"]["calibration"]["files"]
    assert [file["kind"] for file in files] == ["plain text", "chat", "documents"]
    assert [file["documents"] for file in files] == [1, 8, 9]
    # w1, 40 words, w2, 40 words, w2 for each chat.
    assert [file["tokens"] for file in files] == [len(words), 8 * 83, 9 * 40]
    assert sum(file["sequences"] for file in files) == 8
    alone = drive(copied, text=chat).succeeded()
    assert alone.report()["texts"]["calibration"]["files"][0]["sequences"] == 8
    for linear in alone.report()["linears"]:
        assert linear["tokens"] == 8 * 32


def test_the_models_own_samples(llama: Path, drive: Driver) -> None:
    run = drive(llama, "--calibration", "self", text="").succeeded()
    calibration = run.report()["texts"]["calibration"]
    assert calibration["files"][0]["file"] == "self"
    assert calibration["sequences"] == 8
    assert run.report()["settings"]["calibration"] == "self"
    again = drive(llama, "--calibration", "self", text="").succeeded()
    ours, theirs = run.tensors(), again.tensors()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    other = drive(llama, "--calibration", "self", "--seed", 7, text="").succeeded()
    assert other.report()["texts"]["calibration"]["sha256"] != calibration["sha256"]
    drive(llama, "--calibration", "self").refused("files or self")


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf%s", b"%s\r\n", b"\n\n%s\n\n\n", b"%s\x00"],
    ids=["mark", "dos", "blank", "zero"],
)
def test_odd_texts(content: bytes, llama: Path, text: Path, tmp_path: Path, drive: Driver) -> None:
    file = tmp_path / "odd text.TXT"
    file.write_bytes(content.replace(b"%s", text.read_bytes().replace(b" ", b"\r\n", 40)))
    run = drive.evaluated(llama, "--evaluation", file, text=file).succeeded()
    usual = drive.evaluated(llama).succeeded()
    ours, theirs = run.report()["texts"], usual.report()["texts"]
    assert ours["evaluation"]["windows"] == theirs["evaluation"]["windows"]
    if content.startswith(b"%s\r") or content.startswith(b"\n"):
        assert run.report()["perplexity"] == usual.report()["perplexity"]


@pytest.mark.parametrize(
    "content",
    [b"", b" \n", b"w1 w2", b"\xff\xfew\x001\x00", b"\x89PNG\r\n\x1a\n\x00"],
    ids=["empty", "blank", "short", "UTF-16", "picture"],
)
def test_texts_that_do_not_serve(
    content: bytes, llama: Path, tmp_path: Path, drive: Driver
) -> None:
    file = tmp_path / "odd.txt"
    file.write_bytes(content)
    drive(llama, text=file).refused(str(file))
    run = drive(llama, "--evaluation", file, *driving.EVALUATION)
    run.refused(str(file))


def test_a_text_that_is_not_there(llama: Path, tmp_path: Path, drive: Driver) -> None:
    drive(llama, text=tmp_path / "nowhere.txt").refused("nowhere.txt")
    drive(llama, text=tmp_path).refused(str(tmp_path))
    drive(llama, "--evaluation", tmp_path / "nowhere.txt").refused("nowhere.txt")
    drive(llama, "--recipe", tmp_path / "nowhere.yaml").refused("nowhere.yaml")
    drive(llama, "--token-file", tmp_path / "nowhere").refused("nowhere")


@pytest.mark.parametrize("method", ["optq", pytest.param("qronos", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "size",
    [
        ("--sequences", 1, "--sequence-length", 16),
        ("--sequences", 2, "--sequence-length", 8, "--quality", "balanced"),
        ("--sequences", 3, "--batch-size", 1000),
        ("--sequences", 7, "--batch-size", 3),
        ("--sequences", 1, "--sequence-length", 1),
    ],
    ids=lambda size: "-".join(map(str, size)),
)
def test_few_and_odd_sequences(
    size: tuple[object, ...], method: str, save: Save, drive: Driver
) -> None:
    source = save(unusual.qwen3_moe(8))
    run = drive(source, *size, "--method", method)
    if run.status:
        run.refused("sequences")
        return
    given = dict(zip(size[::2], size[1::2], strict=True))
    tokens = int(str(given["--sequences"])) * int(str(given.get("--sequence-length", 32)))
    for linear in run.report()["linears"]:
        if ".experts." not in linear["name"]:
            assert linear["tokens"] == tokens
    assert all(
        bool(torch.isfinite(tensor).all())
        for tensor in run.tensors().values()
        if tensor.is_floating_point()
    )


def test_sequences_longer_than_positions(save: Save, drive: Driver) -> None:
    long = ("--sequences", 2, "--sequence-length", 300)
    # Rotary positions go on; learned ones end.
    run = drive(save(unusual.llama(), "llama"), *long)
    assert run.status in (0, 2)
    source = save(unusual.enlarged(models.make("gpt2")), "gpt2")
    drive(source, *long, "--format", "gptq").refused("300", "256")
    drive(
        source, "--format", "gptq", "--evaluation", drive.text, "--evaluation-window", 300
    ).refused("300", "256")


def test_batches_change_nothing_but_last_bits(llama: Path, drive: Driver) -> None:
    errors = [
        drive(llama, "--batch-size", size).succeeded().report()["totals"]["mean_relative_error"]
        for size in (1, 3, 8)
    ]
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-3)


def test_the_same_command_gives_the_same_bits(llama: Path, drive: Driver) -> None:
    stochastic = ("--rounding", "stochastic", "--format", "dense-f32", "--seed")
    first, second = (drive(llama).succeeded().tensors() for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
    one, same, other = (drive(llama, *stochastic, seed).succeeded().tensors() for seed in (1, 1, 2))
    assert all(one[name].equal(same[name]) for name in one)
    assert not all(one[name].equal(other[name]) for name in one)


# ---- Recipes ----


def test_a_recipe_with_mixed_bits_loads(save: Save, tmp_path: Path, drive: Driver) -> None:
    """And its resolved form makes the same checkpoint."""
    source = save(unusual.llama())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
version: 1
default: {bits: 4, group_size: 32}
rules:
  - {match: 'down_proj$', bits: 8, group_size: 0}
  - {match: 'layers\\.0\\.mlp', ignore: true}
  - {match: 'layers\\.0\\.mlp\\.down', ignore: false, bits: 6}
"""
    )
    run = drive.evaluated(source, "--recipe", recipe).succeeded()
    bits = {
        linear["name"]: linear["certificate"]["spec"]["grid"]["bits"]
        if "grid" in linear["certificate"]["spec"]
        else linear["certificate"]["spec"]["bits"]
        for linear in run.report()["linears"]
    }
    assert len(bits) == 12
    assert bits["model.layers.0.mlp.down_proj"] == 6
    assert bits["model.layers.1.mlp.down_proj"] == 8
    assert bits["model.layers.1.mlp.up_proj"] == 4
    tensors = run.tensors()
    assert tensors["model.layers.1.mlp.down_proj.weight_packed"].shape == (64, 96 * 8 // 32)
    assert "model.layers.0.mlp.gate_proj.weight" in tensors
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run.output)
    assert driving.perplexity(loaded, run.text) == pytest.approx(
        run.report()["perplexity"]["quantized"], rel=1e-3
    )
    again = drive.evaluated(source, "--recipe", run.output / "recipe.yaml").succeeded()
    assert (again.output / "recipe.yaml").read_text() == (run.output / "recipe.yaml").read_text()
    assert again.config() == run.config()
    assert all(again.tensors()[name].equal(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_parts_of_what_loaders_fuse_are_told(format: str, llama: Path, drive: Driver) -> None:
    run = drive(llama, "--format", format, "--ignore", "q_proj", "--dry-run").succeeded()
    warnings = [line for line in run.err.splitlines() if line.startswith("warning: ")]
    assert any("q_proj" in line and "k_proj" in line for line in warnings)


# ---- Interruptions ----


@pytest.fixture
def interrupted(drive: Driver, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """A run that ends in front of its second block."""

    def run(source: Path, *flags: object, **where: Any) -> Outcome:  # noqa: ANN401
        with monkeypatch.context() as patch:
            whole = ModelRun._block

            def dying(self: ModelRun, index: int, done: Any) -> None:  # noqa: ANN401
                if index == 1:
                    raise KeyboardInterrupt
                whole(self, index, done)

            patch.setattr(ModelRun, "_block", dying)
            ended = drive(source, *flags, **where)
        assert ended.status == 130
        assert "start it again to go on" in ended.err
        return ended

    return run


def test_an_interrupted_run_goes_on(
    copied: Path, drive: Driver, interrupted: Callable[..., Outcome], server: Server
) -> None:
    whole = drive.evaluated(copied).succeeded()
    before = jobs_of(server)
    ended = interrupted(copied, "--evaluation", whole.text, *driving.EVALUATION)
    run = drive.evaluated(copied, "--batch-size", 8, output=ended.output).succeeded()
    assert jobs_of(server) - before == 14
    ours, theirs = run.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys()
    # What is left of a run does not tell.
    assert sorted(path.name for path in run.output.iterdir()) == sorted(
        path.name for path in whole.output.iterdir()
    )
    assert run.report()["plan"] == whole.report()["plan"]


def test_a_run_that_did_nothing_leaves_nothing(llama: Path, drive: Driver) -> None:
    """Samples that a model wrote for other settings, for one."""
    own = ("--calibration", "self")
    failed = drive(llama, *own, "--scale-trials", 99, text="")
    assert failed.status == 1
    flags = (*own, "--seed", 7, "--sequences", 4)
    run = drive(llama, *flags, output=failed.output, text="").succeeded()
    alone = drive(llama, *flags, text="").succeeded()
    assert run.report()["texts"] == alone.report()["texts"]
    ours, theirs = run.tensors(), alone.tensors()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_an_interrupted_restart_goes_on(
    llama: Path, drive: Driver, interrupted: Callable[..., Outcome], server: Server
) -> None:
    output = drive(llama).succeeded().output
    before = jobs_of(server)
    interrupted(llama, "--bits", 8, "--restart", output=output)
    run = drive(llama, "--bits", 8, output=output).succeeded()
    assert jobs_of(server) - before == 14
    assert run.report()["settings"]["spec"]["bits"] == 8


def scaled(folder: Path) -> None:
    """Other weights in a file of the same size and time, as a copy of another revision leaves."""
    path = folder / "model.safetensors"
    status = path.stat()
    rewrite(folder, lambda tensors: tensors.update({n: 2 * t for n, t in tensors.items()}))
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def other_words(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"w5"', '"x5"'))


CHANGES: dict[str, tuple[Callable[[Path], None], tuple[object, ...], str]] = {
    "weights": (scaled, (), "model_weights"),
    "config": (lambda f: edit(f / "config.json", rms_norm_eps=0.5), (), "model_config"),
    "tokenizer": (other_words, (), "tokenizer"),
    "template": (lambda f: (f / "chat_template.jinja").write_text("x") and None, (), "other_files"),
    "bits": (lambda f: None, ("--bits", 8), "bits"),
    "ignore": (lambda f: None, ("--ignore", "v_proj"), "ignore"),
    "sequences": (lambda f: None, ("--sequences", 4), "sequences"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_does_not_go_on(
    what: str, copied: Path, drive: Driver, interrupted: Callable[..., Outcome]
) -> None:
    change, flags, words = CHANGES[what]
    ended = interrupted(copied)
    change(copied)
    drive(copied, *flags, output=ended.output).refused("other settings", words, "--restart")
    drive(copied, *flags, "--restart", output=ended.output).succeeded()


@pytest.mark.parametrize("what", ["calibration", "evaluation", "recipe"])
def test_files_that_changed_do_not_go_on(
    what: str,
    llama: Path,
    text: Path,
    tmp_path: Path,
    drive: Driver,
    interrupted: Callable[..., Outcome],
) -> None:
    """By their content: at another place, under another name, they are the same."""
    file = tmp_path / "own" / what
    file.parent.mkdir()
    contents = {"recipe": ("version: 1\n", "version: 1\ndefault: {bits: 3}\n")}
    first, second = contents.get(what, (text.read_text(), text.read_text().replace("w5", "w6")))
    file.write_text(first)
    given: dict[str, Any] = {"text": file} if what == "calibration" else {}
    flags: tuple[object, ...] = () if what == "calibration" else (f"--{what}", file)
    ended = interrupted(llama, *flags, *driving.EVALUATION, **given)
    file.write_text(second)
    drive(llama, *flags, *driving.EVALUATION, output=ended.output, **given).refused(
        "other settings", f"{what}_sha256"
    )
    file.write_text(first)
    drive(llama, *flags, *driving.EVALUATION, output=ended.output, **given).succeeded()


@pytest.mark.parametrize("damage", ["run.json", "linear", "empty"])
def test_a_damaged_journal(
    damage: str, llama: Path, drive: Driver, interrupted: Callable[..., Outcome]
) -> None:
    ended = interrupted(llama)
    journal = ended.output / "unfinished"
    if damage == "run.json":
        (journal / "run.json").write_text("{")
    else:
        path = sorted((journal / "linears").iterdir())[0]
        path.write_bytes(path.read_bytes()[:100] if damage == "linear" else b"")
    drive(llama, output=ended.output).refused(str(journal), "--restart")
    drive(llama, "--restart", output=ended.output).succeeded()


# ---- Full disks ----


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond it fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        # The journal's settings; a linear; the checkpoint; another file; the report.
        (100, "run.json"),
        (2_000, "linears"),
        (40_000, "model.safetensors"),
        (150_000, "large.json"),
        (90_000, "report"),
    ],
)
def test_a_full_disk(size: int, words: str, copied: Path, drive: Driver, server: Server) -> None:
    if words == "large.json":
        (copied / "large.json").write_text("[]" + " " * 200_000)
    before = jobs_of(server)
    with largest_file(size):
        run = drive(copied)
    assert run.status in (1, 2)
    assert run.err.count("\n") == 1, run.err
    assert words in run.err
    assert not (run.output / "report.json").exists()
    again = drive(copied, output=run.output).succeeded()
    if size > 10_000:
        assert jobs_of(server) - before == 14
    transformers.AutoModelForCausalLM.from_pretrained(again.output, quantization_config=UNPACKED)
    assert not list(again.output.rglob(".*"))
    assert not (again.output / "unfinished").exists()
