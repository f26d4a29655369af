"""A server, and small models made from configuration."""

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Nothing is looked up on a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Two cores, and servers beside us: threads that spin while they wait take them from others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Behind this folder.
sys.path.append(str(Path(__file__).resolve().parents[2] / "e2e"))

import certiq
import pytest
import torch
import unusual
from driving import Driver
from models import VOCABULARY
from programs import ROOT, SERVER, Server
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(2)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: tests/run.sh runs it in `all` only")


def pytest_sessionstart() -> None:
    if not SERVER.is_file():
        pytest.exit(f"{SERVER} is not built; see tests/README.md", returncode=3)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"), ["--workers", "2"])
    yield started
    assert started.stop() == 0, started.log()


@pytest.fixture
def client(server: Server) -> Iterator[certiq.Client]:
    with certiq.Client(server.address) as made:
        yield made


@pytest.fixture
def drive(server: Server, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Driver:
    return Driver(server.address, text, tmp_path, capsys)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(os.environ.get("CERTIQ_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no {folder}: see tests/README.md")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{index}": index for index in range(VOCABULARY)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8,192 words, the next often following from the one before."""
    numbers = random.Random(8)
    words = [1]
    for _ in range(8191):
        follows = numbers.random() < 0.7
        words.append((7 * words[-1] + 3) % VOCABULARY if follows else numbers.randrange(VOCABULARY))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


@pytest.fixture(scope="module")
def llama(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model in one file. Nobody changes it."""
    return unusual.saver(tokenizer, tmp_path_factory.mktemp("llama"))(unusual.llama())


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def save(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Path]:
    return unusual.saver(tokenizer, tmp_path)
