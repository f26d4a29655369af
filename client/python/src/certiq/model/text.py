"""Text to tokens: calibration sequences, evaluation windows, the model's own samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from certiq.model.errors import UsageError

# Kinds of files, as reports have them.
PLAIN, DOCUMENTS, CHAT = "plain text", "documents", "chat"
_LINES, _LISTS = (".jsonl", ".ndjson"), (".json",)
# Keys of records, and what each makes of its file; the first that a record has counts.
_KEYS = {"messages": CHAT, "conversations": CHAT, "text": DOCUMENTS}
# ShareGPT's names of who speaks.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
# LLM-QAT (arXiv:2305.17888) takes the likeliest token for the first three to five.
_GREEDY = (3, 4, 5)


@dataclass(frozen=True)
class CalibrationText:
    """Sequences of tokens [count, length], what they were made of, and a digest of that."""

    sequences: torch.Tensor
    described: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class EvaluationText:
    """Windows of tokens [count, window], each beginning with `special` tokens that are no text."""

    windows: torch.Tensor
    special: int
    described: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class _Stream:
    """The tokens of a file, one text after another."""

    path: Path
    kind: str
    documents: int
    ids: torch.Tensor
    sha256: str

    def described(self) -> dict[str, Any]:
        return {
            "file": self.path.name,
            "kind": self.kind,
            "documents": self.documents,
            "tokens": len(self.ids),
            "sha256": self.sha256,
        }


def read_calibration(
    paths: Sequence[Path],
    tokenizer: Any,
    count: int,
    length: int,
    *,
    vocabulary: int | None = None,
) -> CalibrationText:
    """`count` sequences of `length` tokens out of files, which share them by their tokens.

    A file that ends in .jsonl or .ndjson has a record on each line, one in .json a list of them:
    {"text": ..} is a document, {"messages": ..} (or ShareGPT's "conversations") a chat, which is
    written by the tokenizer's template. All others are plain text in UTF-8. Documents and chats
    have the special tokens that the tokenizer gives a text, and are packed one after another. Every
    sequence begins with the special tokens that the tokenizer puts before a text; encoders' end
    with those after it. `vocabulary` is the number of tokens that the model knows.
    """
    if not paths:
        raise UsageError("calibration: expected a file, got none")
    streams = [_read(path, tokenizer) for path in paths]
    shares = _shares([len(stream.ids) for stream in streams], count)
    before, after = _window_frame(tokenizer)
    own = length - len(before) - len(after)
    described, rows = [], []
    for stream, share in zip(streams, shares, strict=True):
        found = stream.described() | {"sequences": share}
        # What several sequences read more than once counts more than the rest.
        found["overlapping"] = share > 1 and share * own > len(stream.ids)
        described.append(found)
        if share:
            made = calibration_sequences(
                stream.ids, share, length, tokenizer, source=str(stream.path)
            )
            _check_vocabulary(made, tokenizer, vocabulary, stream.path)
            rows.append(made)
    digest = _joined_digest(streams)
    return CalibrationText(
        torch.cat(rows),
        {
            "files": described,
            "sequences": count,
            "length": length,
            "begins_with": _names(tokenizer, before),
            "ends_with": _names(tokenizer, after),
            "sha256": digest,
        },
        digest,
    )


def read_evaluation(
    path: Path, tokenizer: Any, tokens: int, window: int, *, vocabulary: int | None = None
) -> EvaluationText:
    """The first `tokens` tokens of a file, of any kind that calibration reads, in windows."""
    stream = _read(path, tokenizer)
    before, _ = _frame(tokenizer)
    windows = evaluation_windows(stream.ids, tokens, window, source=str(path), before=before)
    _check_vocabulary(windows, tokenizer, vocabulary, path)
    described = stream.described() | {
        "windows": len(windows),
        "window": window,
        "begins_with": _names(tokenizer, before),
    }
    return EvaluationText(windows, len(before), described, stream.sha256)


@torch.no_grad()
def self_samples(
    model: Any, tokenizer: Any, count: int, length: int, seed: int, batch_size: int
) -> CalibrationText:
    """`count` sequences that the model itself writes, as LLM-QAT (arXiv:2305.17888) has them.

    Each begins with the special tokens that the tokenizer puts before a text and one random token,
    without which all would begin alike; the likeliest tokens follow, three to five, then tokens
    drawn at temperature 1. The end of text is never drawn. The same seed and batch size give the
    same samples; torch's own generators are left as they were.
    """
    from transformers import GenerationConfig

    name = type(model).__name__
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise UsageError(
            f"calibration self: expected a model that writes text, got {name}: "
            "give a text of its language instead"
        )
    before, _ = _frame(tokenizer)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length < len(before) + 2 or (positions and length > positions):
        raise UsageError(
            f"calibration self: expected sequences of {len(before) + 2} to "
            f"{positions or 'any number of'} tokens for {name}, got {length}"
        )
    special = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    starts = torch.tensor([token for token in range(known) if token not in special])
    settings = model.generation_config
    # The model's own would cut the tails off, or punish what repeats.
    model.generation_config = GenerationConfig(
        eos_token_id=settings.eos_token_id, pad_token_id=tokenizer.pad_token_id or 0
    )
    batches = []
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)):
            torch.manual_seed(seed)
            for index, first in enumerate(range(0, count, batch_size)):
                rows = min(batch_size, count - first)
                chosen = starts[torch.randint(len(starts), (rows, 1))]
                ids = torch.cat([torch.tensor([before] * rows, dtype=torch.int64), chosen], dim=1)
                ids = ids.to(model.device)
                likeliest = min(_GREEDY[index % len(_GREEDY)], length - ids.shape[1])
                if likeliest:
                    ids = _continued(model, ids, likeliest, do_sample=False)
                if ids.shape[1] < length:
                    ids = _continued(
                        model,
                        ids,
                        length - ids.shape[1],
                        do_sample=True,
                        temperature=1.0,
                        top_k=0,
                        top_p=1.0,
                    )
                batches.append(ids.cpu())
    finally:
        model.generation_config = settings
    sequences = torch.cat(batches)
    digest = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
    return CalibrationText(
        sequences,
        {
            "files": [
                {
                    "file": "self",
                    "kind": "the model's own samples (LLM-QAT, arXiv:2305.17888)",
                    "documents": count,
                    "tokens": sequences.numel(),
                    "sequences": count,
                    "overlapping": False,
                }
            ],
            "sequences": count,
            "length": length,
            "seed": seed,
            "batch_size": batch_size,
            "begins_with": _names(tokenizer, before),
            "ends_with": [],
            "sha256": digest,
        },
        digest,
    )


def read_token_ids(path: Path, tokenizer: Any) -> torch.Tensor:
    """The token ids of a file: plain text without special tokens, documents and chats with."""
    return _read(path, tokenizer).ids


def calibration_sequences(
    ids: torch.Tensor, count: int, length: int, tokenizer: Any, *, source: str
) -> torch.Tensor:
    """`count` sequences [count, length], evenly spaced over the ids.

    Each begins with the special tokens that the tokenizer puts before a text, within `length`;
    those of encoders ([CLS], [SEP]) end with the ones after it.
    """
    before, after = _window_frame(tokenizer)
    own = length - len(before) - len(after)
    if own < 1:
        raise UsageError(
            f"{source}: expected sequences of more than {length - own} tokens, as many as the "
            f"tokenizer's special ones, got {length}"
        )
    if len(ids) < own or (_begins(ids, 0, before) and len(ids) < own + len(before)):
        needed = own + (len(before) if _begins(ids, 0, before) else 0)
        raise UsageError(
            f"{source}: expected at least {needed} tokens for sequences of {length}, "
            f"got {len(ids)}: add text, leave the file out, or ask for shorter sequences"
        )
    starts = [index * (len(ids) - own) // max(1, count - 1) for index in range(count)]
    rows = [[*before, *_own(ids, start, own, before), *after] for start in starts]
    return torch.tensor(rows, dtype=torch.int64).reshape(count, length)


def evaluation_windows(
    ids: torch.Tensor, tokens: int, window: int, *, source: str, before: Sequence[int] = ()
) -> torch.Tensor:
    """The first `tokens` tokens in consecutive windows [count, window]; the rest is left out.

    Each window begins with the special tokens `before`, within its length.
    """
    own = window - len(before)
    count = min(tokens, len(ids)) // own if own > 0 else 0
    if count < 1:
        raise UsageError(
            f"{source}: expected at least one window of {window} tokens"
            f"{f', {len(before)} of them special' if before else ''}, got {len(ids)} "
            f"of which {tokens} were asked for: add text, or ask for a shorter window"
        )
    text = ids[: count * own].reshape(count, own)
    return torch.cat([torch.tensor([list(before)] * count, dtype=text.dtype), text], dim=1)


def _continued(model: Any, ids: torch.Tensor, tokens: int, **how: Any) -> torch.Tensor:
    try:
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            use_cache=True,
            **how,
        )
    except RuntimeError as error:
        # Drawing from what is no distribution.
        raise UsageError(
            f"calibration self: {type(model).__name__} cannot be drawn from: {_line(error)}: "
            "give a text instead"
        ) from error
    assert isinstance(made, torch.Tensor)
    return made


def _cuda_devices(model: Any) -> list[Any]:
    return [model.device] if model.device.type == "cuda" else []


def _read(path: Path, tokenizer: Any) -> _Stream:
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a text file in UTF-8: {error}") from error
    sha256 = hashlib.sha256(raw).hexdigest()
    if path.suffix.lower() not in (*_LINES, *_LISTS):
        _refuse_records(path, text)
        # Text files of any system have the same ends of lines.
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        # A whole file is longer than any context; that warning is not for us.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return _Stream(path, PLAIN, 1, torch.tensor(ids, dtype=torch.int64), sha256)
    kind, records = _records(path, text.removeprefix("\ufeff"))
    if kind == CHAT:
        documents = [_chat_ids(where, record, tokenizer) for where, record in records]
    else:
        texts = [_document(where, record) for where, record in records]
        bare = _is_encoder(tokenizer)
        documents = tokenizer(texts, add_special_tokens=not bare, verbose=False)["input_ids"]
        if bare:
            # Encoders learn on documents with separators between, in one frame (RoBERTa,
            # arXiv:1907.11692).
            _, after = _frame(tokenizer)
            documents = [[*ids, *after] for ids in documents]
    ids = [token for document in documents for token in document]
    return _Stream(path, kind, len(documents), torch.tensor(ids, dtype=torch.int64), sha256)


def _refuse_records(path: Path, text: str) -> None:
    """A record that would be read as prose, braces and all, is a mistake in the file's name."""
    first = text.lstrip("\ufeff \t\r\n").partition("\n")[0]
    if not first.startswith("{"):
        return
    try:
        record = json.loads(first)
    except ValueError:
        return
    key = next((key for key in _KEYS if key in record), None)
    if key is not None:
        raise UsageError(
            f'{path}: expected plain text, got records with "{key}": name the file .jsonl'
        )


def _records(path: Path, text: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The kind of a file of records, and each record with its place in words."""
    found: list[tuple[str, dict[str, Any]]] = []
    kind = ""
    for where, record in _parsed(path, text):
        key = next((key for key in _KEYS if isinstance(record, dict) and key in record), None)
        if key is None:
            got = (
                f"the keys {', '.join(record) or 'none'}"
                if isinstance(record, dict)
                else type(record).__name__
            )
            raise UsageError(
                f'{where}: expected an object with "text", "messages" or "conversations", got {got}'
            )
        if kind and _KEYS[key] != kind:
            raise UsageError(f'{where}: expected {kind}, as before it, got "{key}"')
        kind = _KEYS[key]
        found.append((where, record))
    if not found:
        raise UsageError(f"{path}: expected records, got none")
    return kind, found


def _parsed(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() in _LISTS:
        try:
            items = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{path}: expected JSON: {error}") from error
        if not isinstance(items, list):
            raise UsageError(
                f"{path}: expected a list of objects, got {type(items).__name__} "
                "(an object a line is .jsonl)"
            )
        for number, item in enumerate(items, 1):
            yield f"{path}: item {number}", item
        return
    # Other ends of lines that Unicode knows may be inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}: line {number}: expected JSON: {error}") from error
        yield f"{path}: line {number}", record


def _document(where: str, record: dict[str, Any]) -> str:
    text = record["text"]
    if not isinstance(text, str) or not text.strip():
        got = "an empty one" if isinstance(text, str) else type(text).__name__
        raise UsageError(f"{where}: expected a text, got {got}")
    _check_encodable(where, text)
    return text


def _check_encodable(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: expected Unicode text: {error}") from error


def _chat_ids(where: str, record: dict[str, Any], tokenizer: Any) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(
            f"{where}: expected a tokenizer with a chat template to write chats with, got one "
            'without: add the model\'s chat_template.jinja, or give {"text": ..} that is written '
            "already"
        )
    messages = _messages(where, record)
    tools = record.get("tools")
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
    except Exception as error:
        # Templates are programs, which end in any way.
        raise UsageError(
            f"{where}: expected a chat that the model's template writes, got: {_line(error)}"
        ) from error
    _check_encodable(where, text)
    # The template writes the special tokens that a chat has.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise UsageError(f"{where}: expected a chat, got one that the model's template leaves out")
    return ids


def _messages(where: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    key = "messages" if "messages" in record else "conversations"
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: expected a list of messages in {key}, got {messages!r:.60}")
    found = []
    for number, message in enumerate(messages, 1):
        if isinstance(message, dict) and isinstance(message.get("from"), str):
            role = _ROLES.get(message["from"])
            message = {"role": role, "content": message.get("value")}
        fits = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not fits or (message.get("content") is None and "tool_calls" not in message):
            raise UsageError(
                f"{where}: message {number}: expected a role and a content (or from, one of "
                f"{', '.join(_ROLES)}, and value), got {messages[number - 1]!r:.60}"
            )
        found.append(message)
    if not any(message.get("content") or message.get("tool_calls") for message in found):
        raise UsageError(f"{where}: expected a chat in which something is said, got empty messages")
    return found


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` divided in proportion, by largest remainders."""
    total = max(1, sum(sizes))
    shares = [count * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda index: -(count * sizes[index] % total))
    for index in order[: count - sum(shares)]:
        shares[index] += 1
    return shares


def _begins(ids: torch.Tensor, start: int, tokens: Sequence[int]) -> bool:
    return bool(tokens) and ids[start : start + len(tokens)].tolist() == list(tokens)


def _own(ids: torch.Tensor, start: int, own: int, before: Sequence[int]) -> list[int]:
    """`own` tokens from `start`, or near it where a document begins, whose tokens are there."""
    if _begins(ids, start, before):
        fits = start + len(before) + own <= len(ids)
        start = start + len(before) if fits else max(0, start - len(before))
    found: list[int] = ids[start : start + own].tolist()
    return found


def _check_vocabulary(
    rows: torch.Tensor, tokenizer: Any, vocabulary: int | None, path: Path
) -> None:
    largest = int(rows.max())
    if vocabulary is not None and largest >= vocabulary:
        raise UsageError(
            f"{path}: expected tokens below the model's {vocabulary}, got {largest} "
            f"({_names(tokenizer, [largest])[0]!r}): the tokenizer is not this model's"
        )


def _joined_digest(streams: Sequence[_Stream]) -> str:
    digest = hashlib.sha256()
    for stream in streams:
        # The kind is in the name, not in the content.
        digest.update(f"{stream.kind} {stream.sha256}\n".encode())
    return digest.hexdigest()


def _names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [str(name) for name in tokenizer.convert_ids_to_tokens(list(ids))]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_encoder(tokenizer: Any) -> bool:
    return tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None


def _window_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens around a sequence; what ends a text does not end a piece of it."""
    before, after = _frame(tokenizer)
    return before, after if _is_encoder(tokenizer) else []


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text."""
    text = "a"
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    framed = tokenizer(text)["input_ids"]
    for start in range(len(framed) - len(own) + 1):
        if framed[start : start + len(own)] == own:
            return framed[:start], framed[start + len(own) :]
    raise UsageError(f"the tokenizer makes {framed} of {text!r}, in which {own} is not found")
