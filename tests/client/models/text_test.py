"""Calibration and evaluation text: kinds of files, special tokens, windows, own samples."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from certiq.model.errors import UsageError
from certiq.model.text import (
    calibration_sequences,
    evaluation_windows,
    read_calibration,
    read_evaluation,
    read_token_ids,
    self_samples,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, EOS, PAD, CLS, SEP = range(256, 261)
SPECIAL = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, "[CLS]": CLS, "[SEP]": SEP}
VOCABULARY = 261
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user speaks first') }}"
    "{% endif %}{{ bos_token }}{% for message in messages %}"
    "<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
)


def byte_tokenizer(template: str | None = None, *, encoder: bool = False) -> Any:  # noqa: ANN401
    """Bytes and special tokens; `template` is what it makes of a text."""
    table = {character: index for index, character in enumerate(ALPHABET)} | SPECIAL
    made = Tokenizer(BPE(vocab=table, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if template is not None:
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(SPECIAL.items())
        )
    more = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if encoder else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **more
    )


@pytest.fixture(scope="module")
def plain() -> Any:  # noqa: ANN401
    return byte_tokenizer()


@pytest.fixture(scope="module")
def with_bos() -> Any:  # noqa: ANN401
    return byte_tokenizer("<s> $A")


@pytest.fixture
def chat() -> Any:  # noqa: ANN401
    tokenizer = byte_tokenizer("<s> $A")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prose(characters: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(ord("a"), ord("z") + 1, (characters,), generator=generator)
    return "".join(map(chr, letters.tolist()))


def ids_of(text: str) -> list[int]:
    """The table of bytes, without a tokenizer; ASCII stands for itself."""
    return [ALPHABET.index("\u0120" if character == " " else character) for character in text]


def write(path: Path, content: object) -> Path:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        assert isinstance(content, list)
        path.write_text("".join(json.dumps(record) + "\n" for record in content))
    return path


def evenly(ids: Sequence[int], count: int, own: int) -> list[list[int]]:
    starts = [index * (len(ids) - own) // max(1, count - 1) for index in range(count)]
    return [list(ids[start : start + own]) for start in starts]


def test_plain_text_without_special_tokens(plain: Any, tmp_path: Path) -> None:  # noqa: ANN401
    text = prose(1000)
    path = write(tmp_path / "text.txt", text)
    made = read_calibration([path], plain, 7, 64)
    assert made.sequences.dtype == torch.int64
    assert made.sequences.tolist() == evenly(ids_of(text), 7, 64)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    assert made.described == {
        "files": [
            {
                "file": "text.txt",
                "kind": "plain text",
                "documents": 1,
                "tokens": 1000,
                "sha256": sha256,
                "sequences": 7,
                "overlapping": False,
            }
        ],
        "sequences": 7,
        "length": 64,
        "begins_with": [],
        "ends_with": [],
        "sha256": made.digest,
    }
    json.dumps(made.described)
    old = calibration_sequences(read_token_ids(path, plain), 7, 64, plain, source="text")
    assert torch.equal(made.sequences, old)
    assert read_calibration([path], plain, 20, 64).described["files"][0]["overlapping"]


def test_every_sequence_begins_as_a_text_does(with_bos: Any, tmp_path: Path) -> None:  # noqa: ANN401
    text = prose(1000)
    path = write(tmp_path / "text", text)
    made = read_calibration([path], with_bos, 7, 64)
    assert made.sequences.tolist() == [[BOS, *own] for own in evenly(ids_of(text), 7, 63)]
    assert made.described["begins_with"] == ["<s>"]
    assert made.described["files"][0]["tokens"] == 1000
    # What ends a text does not end a piece of it.
    both = byte_tokenizer("<s> [CLS] $A </s>")
    made = read_calibration([path], both, 7, 64)
    assert made.sequences.tolist() == [[BOS, CLS, *own] for own in evenly(ids_of(text), 7, 62)]
    assert made.described["ends_with"] == []


def test_sequences_of_encoders(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("[CLS] $A [SEP]", encoder=True)
    path = write(tmp_path / "text.txt", prose(1000))
    made = read_calibration([path], tokenizer, 5, 32)
    assert made.sequences.tolist() == [
        [CLS, *own, SEP] for own in evenly(ids_of(prose(1000)), 5, 30)
    ]
    assert made.described["ends_with"] == ["[SEP]"]
    documents = write(tmp_path / "some.jsonl", [{"text": prose(50, seed)} for seed in range(4)])
    made = read_calibration([documents], tokenizer, 3, 32)
    stream = [token for seed in range(4) for token in [*ids_of(prose(50, seed)), SEP]]
    assert made.sequences.tolist() == [[CLS, *own, SEP] for own in evenly(stream, 3, 30)]


@pytest.mark.parametrize("name", ["some.jsonl", "some.ndjson", "some.JSONL", "some.json"])
def test_documents_are_packed(plain: Any, tmp_path: Path, name: str) -> None:  # noqa: ANN401
    """With what the tokenizer puts around each, cut as a stream; other keys do not matter."""
    records = [{"text": prose(40 + 7 * seed, seed), "id": seed} for seed in range(9)]
    path = write(tmp_path / name.lower(), records)
    if name != path.name:
        path = path.rename(tmp_path / name)
    stream = [token for record in records for token in ids_of(str(record["text"]))]
    made = read_calibration([path], plain, 6, 50)
    assert made.sequences.tolist() == evenly(stream, 6, 50)
    assert made.described["files"][0]["kind"] == "documents"
    assert made.described["files"][0]["documents"] == 9
    ends = byte_tokenizer("$A </s>")
    stream = [token for record in records for token in [*ids_of(str(record["text"])), EOS]]
    assert read_calibration([path], ends, 6, 50).sequences.tolist() == evenly(stream, 6, 50)


def test_windows_at_the_beginning_of_documents(with_bos: Any, tmp_path: Path) -> None:  # noqa: ANN401
    """Documents of 50 tokens with BOS: windows begin with one BOS and never with two."""
    records = [{"text": prose(49, seed)} for seed in range(40)]
    path = write(tmp_path / "some.jsonl", records)
    stream = [token for record in records for token in [BOS, *ids_of(record["text"])]]
    for count, length in ((1, 50), (39, 51), (40, 51), (1951, 50), (3, 2000)):
        made = read_calibration([path], with_bos, count, length)
        assert made.sequences.shape == (count, length)
        assert made.sequences[:, 0].unique().tolist() == [BOS]
        assert BOS not in made.sequences[:, 1]
        assert made.sequences[0].tolist() == stream[:length]
        last = made.sequences[-1].tolist()
        assert count == 1 or last[1:] == stream[-length + 1 :] or last[1:] == stream[-length:-1]
    with pytest.raises(UsageError, match="at least 2001 tokens for sequences of 2001, got 2000"):
        read_calibration([path], with_bos, 1, 2001)


def test_blank_lines_and_marks_of_the_encoding(plain: Any, tmp_path: Path) -> None:  # noqa: ANN401
    """U+2028 ends no line of JSON."""
    path = tmp_path / "some.jsonl"
    content = '\ufeff{"text": "one\u2028two"}\r\n\r\n{"text": "three"}\n'
    path.write_bytes(content.encode())
    made = read_calibration([path], plain, 1, 14)
    assert plain.decode(made.sequences[0]) == "one\u2028twothree"


def test_ends_of_lines_in_plain_text(plain: Any, tmp_path: Path) -> None:  # noqa: ANN401
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\rthree\nfour")
    assert plain.decode(read_token_ids(path, plain)) == "one\ntwo\nthree\nfour"


def test_chats_by_the_template(chat: Any, tmp_path: Path) -> None:  # noqa: ANN401
    records = [
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "O"}]},
        {
            "conversations": [
                {"from": "system", "value": "Be."},
                {"from": "human", "value": "Why"},
                {"from": "gpt", "value": "So"},
            ],
            "text": "a chat is a chat",
        },
    ]
    stream = [BOS, *ids_of("<user>Hello"), EOS, *ids_of("<assistant>O"), EOS]
    stream += [BOS, *ids_of("<system>Be."), EOS, *ids_of("<user>Why"), EOS]
    stream += [*ids_of("<assistant>So"), EOS]
    path = write(tmp_path / "chat.jsonl", records)
    assert read_token_ids(path, chat).tolist() == stream
    made = read_calibration([path], chat, 3, 16)
    assert made.described["files"][0]["kind"] == "chat"
    assert made.described["files"][0]["documents"] == 2
    assert made.sequences[0].tolist() == stream[:16]
    assert made.sequences[1].tolist() == [BOS, *evenly(stream, 3, 15)[1]]


def test_tools_reach_the_template(chat: Any, tmp_path: Path) -> None:  # noqa: ANN401
    chat.chat_template = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    record = {"messages": [{"role": "user", "content": "?"}], "tools": [tool]}
    path = write(tmp_path / "chat.jsonl", [record])
    assert read_token_ids(path, chat).tolist() == ids_of("weather")


def test_files_share_by_their_tokens(chat: Any, tmp_path: Path) -> None:  # noqa: ANN401
    text = write(tmp_path / "text.txt", prose(3000))
    documents = write(tmp_path / "some.jsonl", [{"text": prose(999, seed)} for seed in range(2)])
    messages = [{"role": "user", "content": prose(992)}]
    chats = write(tmp_path / "chat.json", [{"messages": messages}])
    tiny = write(tmp_path / "tiny.txt", "a")
    made = read_calibration([text, documents, chats, tiny], chat, 12, 32)
    files = made.described["files"]
    assert [file["tokens"] for file in files] == [3000, 2000, 1000, 1]
    assert [file["sequences"] for file in files] == [6, 4, 2, 0]
    parts = [read_calibration([path], chat, n, 32) for path, n in ((text, 6), (documents, 4))]
    assert torch.equal(made.sequences[:10], torch.cat([part.sequences for part in parts]))
    assert made.sequences.shape == (12, 32)
    for count in range(1, 30):
        files = read_calibration([text, documents, chats, tiny], chat, count, 32).described["files"]
        assert sum(file["sequences"] for file in files) == count


def test_digest(plain: Any, tmp_path: Path) -> None:  # noqa: ANN401
    """It follows the contents and their order, not names of folders nor times."""
    one, two = write(tmp_path / "1.txt", prose(200)), write(tmp_path / "2.txt", prose(200, 1))
    digest = read_calibration([one, two], plain, 2, 16).digest
    (tmp_path / "there").mkdir()
    moved = write(tmp_path / "there" / "1.txt", prose(200))
    assert read_calibration([moved, two], plain, 2, 16).digest == digest
    assert read_calibration([two, one], plain, 2, 16).digest != digest
    write(one, prose(200, 2))
    assert read_calibration([one, two], plain, 2, 16).digest != digest


CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt: expected at least 15 tokens for sequences of 16, got 0: add text"),
        ("a.txt", "short", "got 5: add text, leave the file out, or ask for shorter"),
        ("a.txt", json.dumps(CHAT), 'a.txt: expected plain text, got records with "messages"'),
        ("a.jsonl", "", "a.jsonl: expected records, got none"),
        ("a.jsonl", prose(50), "a.jsonl: line 1: expected JSON: "),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', "a.jsonl: line 3: expected JSON: "),
        ("a.jsonl", [{"text": "a"}, {"prompt": "a", "b": 1}], "line 2: .* the keys prompt, b$"),
        ("a.jsonl", [{"text": "a"}, ["b"]], "line 2: expected an object .* got list"),
        ("a.jsonl", [{"text": "a"}, {"text": " \n"}], "line 2: expected a text, got an empty one"),
        ("a.jsonl", [{"text": 5}], "line 1: expected a text, got int"),
        ("a.jsonl", [{"text": "a"}, CHAT], 'line 2: expected documents, .* got "messages"'),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1: expected Unicode text: "),
        ("a.json", {"text": "a"}, "a.json: expected a list of objects, got dict"),
        ("a.json", "[1", "a.json: expected JSON: "),
        ("a.json", [{"text": "a"}, {}], "a.json: item 2: .* the keys none"),
        ("a.jsonl", [{"messages": []}], "line 1: expected a list of messages in messages, got "),
        ("a.jsonl", [{"messages": "Hi"}], "line 1: expected a list of messages"),
        ("a.jsonl", [{"messages": [{"role": "user"}]}], "message 1: expected a role and a content"),
        (
            "a.jsonl",
            [CHAT, {"conversations": [{"from": "Bob", "value": "a"}]}],
            "line 2: message 1: expected .* one of human, user, gpt, .* got {'from': 'Bob'",
        ),
        (
            "a.jsonl",
            [{"messages": [{"role": "user", "content": ""}]}],
            "line 1: expected a chat in which something is said",
        ),
        (
            "a.jsonl",
            [CHAT, {"messages": [{"role": "assistant", "content": "a"}]}],
            "line 2: expected a chat that the model's template writes, got: a user speaks first",
        ),
    ],
)
def test_what_is_no_text(
    chat: Any,  # noqa: ANN401
    tmp_path: Path,
    name: str,
    content: object,
    message: str,
) -> None:
    path = tmp_path / name
    if isinstance(content, dict):
        path.write_text(json.dumps(content))
    else:
        write(path, content)
    with pytest.raises(UsageError, match=message) as error:
        read_calibration([path], chat, 2, 16)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(plain: Any, tmp_path: Path) -> None:  # noqa: ANN401
    binary = tmp_path / "a.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (binary, tmp_path / "none.txt", tmp_path):
        with pytest.raises(UsageError, match="expected a text file in UTF-8"):
            read_calibration([path], plain, 2, 16)
    with pytest.raises(UsageError, match="expected a file, got none"):
        read_calibration([], plain, 2, 16)


def test_chats_without_a_template(with_bos: Any, tmp_path: Path) -> None:  # noqa: ANN401
    path = write(tmp_path / "chat.jsonl", [CHAT])
    with pytest.raises(UsageError, match="line 1: expected a tokenizer with a chat template"):
        read_calibration([path], with_bos, 2, 16)


def test_tokens_that_the_model_does_not_know(with_bos: Any, tmp_path: Path) -> None:  # noqa: ANN401
    path = write(tmp_path / "text.txt", prose(100))
    read_calibration([path], with_bos, 2, 16, vocabulary=BOS + 1)
    message = f"expected tokens below the model's {BOS}, got {BOS} \\('<s>'\\)"
    with pytest.raises(UsageError, match=message):
        read_calibration([path], with_bos, 2, 16, vocabulary=BOS)
    with pytest.raises(UsageError, match=message):
        read_evaluation(path, with_bos, 64, 16, vocabulary=BOS)


def test_sequences_shorter_than_special_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("[CLS] $A [SEP]", encoder=True)
    path = write(tmp_path / "text.txt", prose(100))
    with pytest.raises(UsageError, match=r"expected sequences of more than 2 tokens, .* got 2"):
        read_calibration([path], tokenizer, 2, 2)


def test_evaluation_windows(plain: Any, with_bos: Any, tmp_path: Path) -> None:  # noqa: ANN401
    text = prose(1000)
    path = write(tmp_path / "text.txt", text)
    ids = torch.tensor(ids_of(text))
    found = read_evaluation(path, plain, 700, 64)
    assert torch.equal(found.windows, ids[:640].reshape(10, 64))
    assert torch.equal(found.windows, evaluation_windows(ids, 700, 64, source="text"))
    assert found.special == 0
    found = read_evaluation(path, with_bos, 700, 64)
    assert found.windows.shape == (11, 64)
    assert found.windows[:, 0].unique().tolist() == [BOS]
    assert torch.equal(found.windows[:, 1:].reshape(-1), ids[: 11 * 63])
    assert found.special == 1
    assert found.described["begins_with"] == ["<s>"]
    assert found.described["windows"] == 11
    assert found.digest == hashlib.sha256(text.encode()).hexdigest()
    for tokens, window in ((700, 1100), (10, 64), (700, 1)):
        with pytest.raises(UsageError, match=f"at least one window of {window} tokens, 1 of them"):
            read_evaluation(path, with_bos, tokens, window)


@pytest.fixture(scope="module")
def model() -> Any:  # noqa: ANN401
    """A llama that knows more tokens than the tokenizer, and has likes and dislikes."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        **models.HEADS | {"vocab_size": 300}, eos_token_id=EOS, bos_token_id=BOS
    )
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.2)
        # Most of what it says is the end of text, were that not forbidden.
        made.lm_head.weight[EOS] = 0
        made.generation_config.repetition_penalty = 5.0
        made.generation_config.top_k = 1
    return made


@pytest.mark.parametrize("bos", [False, True])
def test_own_samples(model: Any, plain: Any, with_bos: Any, bos: bool) -> None:  # noqa: ANN401
    tokenizer = with_bos if bos else plain
    state, settings = torch.get_rng_state(), model.generation_config.to_dict()
    made = self_samples(model, tokenizer, 10, 24, 5, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.to_dict() == settings
    assert made.sequences.shape == (10, 24)
    assert made.sequences.dtype == torch.int64
    assert EOS not in made.sequences
    start = int(bos)
    if bos:
        assert made.sequences[:, 0].unique().tolist() == [BOS]
    assert len(made.sequences[:, start].unique()) > 5
    assert not {BOS, EOS, PAD} & set(made.sequences[:, start].tolist())
    # Batches begin with three, four and five tokens that are the likeliest, by whole forwards.
    likeliest = []
    with torch.no_grad():
        for row, greedy in zip(made.sequences, [3] * 4 + [4] * 4 + [5] * 2, strict=True):
            logits = model(row[None]).logits[0]
            logits[:, EOS] = -torch.inf
            same = logits[start:-1].argmax(-1) == row[start + 1 :]
            assert same[:greedy].all()
            likeliest.append(same[greedy:].float().mean())
    assert torch.stack(likeliest).mean() < 0.7
    assert made.described["files"][0]["sequences"] == 10
    assert made.described["begins_with"] == (["<s>"] if bos else [])
    json.dumps(made.described)
    again = self_samples(model, tokenizer, 10, 24, 5, 4)
    assert torch.equal(again.sequences, made.sequences)
    assert again.digest == made.digest
    other = self_samples(model, tokenizer, 10, 24, 6, 4)
    assert not torch.equal(other.sequences, made.sequences)
    assert other.digest != made.digest


def test_own_samples_follow_the_models_distribution(model: Any, plain: Any) -> None:  # noqa: ANN401
    """At temperature 1, nothing cut off: what it draws is as surprising as it says it is."""
    rows = self_samples(model, plain, 64, 40, 1, 64).sequences
    with torch.no_grad():
        logits = model(rows).logits[:, 3:-1]
    logits[..., EOS] = -torch.inf
    logs = logits.log_softmax(-1)
    surprise = -logs.gather(-1, rows[:, 4:, None]).mean()
    entropies = -(logs.exp() * logs.clamp(min=-1e4)).sum(-1)
    deviation = (logs.exp() * (logs.clamp(min=-1e4) + entropies[..., None]) ** 2).sum(-1).mean()
    assert abs(surprise - entropies.mean()) < 4 * (deviation / entropies.numel()) ** 0.5
    assert entropies.mean() > 1


def test_any_token_but_special_ones_begins_a_sample(model: Any, plain: Any) -> None:  # noqa: ANN401
    first = set(self_samples(model, plain, 2000, 2, 0, 500).sequences[:, 0].tolist())
    assert not {BOS, EOS, PAD} & first
    assert len(first) > 250


def test_short_samples(model: Any, with_bos: Any) -> None:  # noqa: ANN401
    for length in (3, 4, 5, 6):
        assert self_samples(model, with_bos, 2, length, 0, 2).sequences.shape == (2, length)


def test_models_that_write_nothing(model: Any, plain: Any, with_bos: Any) -> None:  # noqa: ANN401
    with pytest.raises(UsageError, match="expected a model that writes text, got BertModel"):
        self_samples(models.make("bert"), plain, 2, 16, 0, 2)
    for length in (2, 257):
        with pytest.raises(UsageError, match=f"sequences of 3 to 256 tokens .* got {length}"):
            self_samples(model, with_bos, 2, length, 0, 2)
    broken = models.make("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UsageError, match="LlamaForCausalLM cannot be drawn from: probability"):
        self_samples(broken, plain, 2, 16, 0, 2)


def test_the_real_shape_of_calls(tokenizer: Any, text: Path) -> None:  # noqa: ANN401
    """The tokenizer of words that other tests have."""
    made: Callable[..., Any] = read_calibration
    sequences = made([text], tokenizer, 8, 64, vocabulary=models.VOCABULARY).sequences
    old = calibration_sequences(read_token_ids(text, tokenizer), 8, 64, tokenizer, source="text")
    assert torch.equal(sequences, old)
