"""The include arrows: main -> rpc -> jobs -> engine, metrics -> jobs' observer, client -> proto.

Those of the Python package, too: what of it may import what.

Debian puts every library's headers into /usr/include, so an include that points the wrong way
compiles. This test reads the #include lines of every room and compares them with the table
below; the last part plants violations and expects to find them.
"""

import ast
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The standard library, as of C++20. Headers of C with their C++ names only.
STANDARD = frozenset(
    """
    algorithm any array atomic barrier bit bitset cassert cctype cerrno cfenv cfloat charconv
    chrono cinttypes climits clocale cmath codecvt compare complex concepts condition_variable
    coroutine csetjmp csignal cstdarg cstddef cstdint cstdio cstdlib cstring ctime cuchar cwchar
    cwctype deque exception execution filesystem format forward_list fstream functional future
    initializer_list iomanip ios iosfwd iostream istream iterator latch limits list locale map
    memory memory_resource mutex new numbers numeric optional ostream queue random ranges ratio
    regex scoped_allocator semaphore set shared_mutex source_location span sstream stack stdexcept
    stop_token streambuf string string_view syncstream system_error thread tuple type_traits
    typeindex typeinfo unordered_map unordered_set utility valarray variant vector version
    """.split()
)
# What reads or writes files, or speaks to the terminal.
FILES = frozenset("cstdio filesystem fstream iostream istream ostream streambuf syncstream".split())

POSIX = (
    "fcntl.h",
    "poll.h",
    "pthread.h",
    "signal.h",
    "sys/",
    "termios.h",
    "unistd.h",
)
FILE_CALLS = ("fcntl.h", "sys/file.h", "sys/stat.h", "sys/types.h", "unistd.h")
SOCKETS = ("arpa/inet.h", "netdb.h", "netinet/in.h", "sys/socket.h", "unistd.h")
# Values, strings, errors: no clocks, locks, flags or logs.
ABSL_VALUES = (
    "absl/algorithm/",
    "absl/base/",
    "absl/cleanup/",
    "absl/container/",
    "absl/functional/",
    "absl/hash/",
    "absl/memory/",
    "absl/meta/",
    "absl/numeric/",
    "absl/status/",
    "absl/strings/",
    "absl/types/",
    "absl/utility/",
)
MESSAGES = ("certiq/v1/*.pb.h", "google/protobuf/", "google/rpc/*.pb.h")
GRPC = ("grpc/", "grpcpp/")


@dataclass(frozen=True)
class Room:
    """Files that share the right to include.

    `allowed` holds prefixes that end in "/", patterns with one "*", and whole names. Names
    without a folder are the room's own if a file of that name lies in one of its folders.
    """

    name: str
    folders: tuple[str, ...]
    allowed: tuple[str, ...]
    without_standard: frozenset[str] = field(default_factory=frozenset)
    recursive: bool = True


ROOMS = (
    Room(
        "engine",
        ("server/engine",),
        # sys/mman.h: large pages.
        ("engine/", "Eigen/", "sys/mman.h", *ABSL_VALUES),
        without_standard=FILES,
    ),
    Room(
        "jobs",
        ("server/jobs",),
        # std locks and clocks, not Abseil's: ThreadSanitizer cannot see into its library.
        # unistd.h: how much memory the machine has.
        # openssl has SHA-256.
        ("jobs/", "engine/", "unistd.h", "openssl/", *ABSL_VALUES),
        recursive=False,
    ),
    Room(
        "store",
        ("server/jobs/store",),
        # Only here are files written: a seam for each way to them.
        ("jobs/", "sqlite3.h", "xxhash.h", *FILE_CALLS, *ABSL_VALUES),
    ),
    Room(
        "metrics",
        ("server/metrics",),
        (
            "metrics/",
            "jobs/*observer*.h",
            "engine/",
            "prometheus/",
            "civetweb.h",
            "CivetServer.h",
            # The log.
            "spdlog/",
            "nlohmann/",
            "absl/",
            *SOCKETS,
        ),
    ),
    Room(
        "rpc",
        ("server/rpc",),
        # Addresses are looked up before gRPC sees them; openssl has SHA-256 and certificates;
        # tokens and certificates are files that change.
        (
            *("rpc/", "jobs/", "engine/", "absl/", "openssl/", "sys/stat.h", *MESSAGES, *GRPC),
            *SOCKETS,
        ),
    ),
    Room(
        "main",
        ("server",),
        (
            *("rpc/", "metrics/", "jobs/", "CLI/", "spdlog/", "absl/", *POSIX),
            # The engine's version and instruction set, for the log and the metrics.
            "engine/quantize_layer.h",
        ),
        recursive=False,
    ),
    Room(
        "client library",
        ("client/cpp/include", "client/cpp/src"),
        ("certiq/*.h", "nlohmann/", "openssl/", "absl/", *MESSAGES, *GRPC, *POSIX),
    ),
    Room(
        "verifier",
        ("client/cpp/verify",),
        # Arithmetic of its own, so that it does not repeat the engine's mistakes.
        ("certiq/*.h", "Eigen/", "openssl/", "absl/", *MESSAGES),
    ),
    Room(
        "command line",
        ("client/cpp/cli",),
        ("certiq/*.h", "verify.h", "nlohmann/", "CLI/", "absl/", *MESSAGES, *POSIX),
    ),
)


@dataclass(frozen=True)
class PythonRoom:
    """Modules that share the right to import: the standard library, `allowed`, and of certiq
    itself everything but `never`."""

    name: str
    folder: str
    allowed: frozenset[str]
    never: tuple[str, ...] = ()
    recursive: bool = True


PYTHON = "client/python"
PACKAGE = f"{PYTHON}/src/certiq"
PYTHON_ROOMS = (
    # google has protobuf and google.rpc; torch is imported for those who bring its tensors, tqdm
    # for those who ask for a bar.
    PythonRoom(
        "python client",
        PACKAGE,
        frozenset({"google", "grpc", "ml_dtypes", "numpy", "torch", "tqdm"}),
        never=("certiq.torch", "certiq.model", "certiq.experiments"),
        recursive=False,
    ),
    PythonRoom(
        "python torch",
        f"{PACKAGE}/torch",
        # google.protobuf's messages come from certiq itself; transformers is not needed.
        frozenset({"numpy", "torch"}),
        never=("certiq.model", "certiq.experiments"),
    ),
    PythonRoom(
        "python model",
        f"{PACKAGE}/model",
        frozenset(
            {"accelerate", "gguf", "google", "numpy", "safetensors", "torch", "tqdm"}
            | {"transformers"}
        ),
        never=("certiq.experiments",),
    ),
    PythonRoom(
        "python experiments",
        f"{PACKAGE}/experiments",
        frozenset({"matplotlib", "ml_dtypes", "numpy", "safetensors"}),
        never=("certiq.torch", "certiq.model"),
    ),
    PythonRoom("python contract", f"{PACKAGE}/_proto", frozenset({"google"}), never=("certiq",)),
    PythonRoom(
        "python build", PYTHON, frozenset({"grpc_tools", "hatchling"}), ("certiq",), recursive=False
    ),
)

INCLUDE = re.compile(r"^[ \t]*#[ \t]*(?:include|include_next|import)\b[ \t]*(.*)$", re.MULTILINE)
TARGET = re.compile(r'(?:<([^>]+)>|"([^"]+)")')


def sources(root: Path, room: Room) -> Iterator[Path]:
    for folder in room.folders:
        pattern = "**/*" if room.recursive else "*"
        for path in sorted((root / folder).glob(pattern)):
            if path.suffix in {".h", ".cc", ".inc"} and path.is_file():
                yield path


def matches(target: str, pattern: str) -> bool:
    if pattern.endswith("/"):
        return target.startswith(pattern)
    if "*" in pattern:
        # "*" stays within a folder.
        parts = [re.escape(part) for part in pattern.split("*")]
        return re.fullmatch("[^/]*".join(parts), target) is not None
    return target == pattern


def allowed(root: Path, room: Room, target: str) -> bool:
    if ".." in target.split("/") or target.startswith("/"):
        return False
    if target in STANDARD:
        return target not in room.without_standard
    if "/" not in target and any((root / folder / target).is_file() for folder in room.folders):
        return True
    return any(matches(target, pattern) for pattern in room.allowed)


def wrong_includes(root: Path, room: Room) -> list[str]:
    wrong = []
    for path in sources(root, room):
        text = path.read_text(encoding="utf-8")
        for match in INCLUDE.finditer(text):
            parsed = TARGET.match(match.group(1))
            target = (parsed.group(1) or parsed.group(2)) if parsed else match.group(1).strip()
            if parsed is None or not allowed(root, room, target):
                line = text.count("\n", 0, match.start()) + 1
                wrong.append(f"{path.relative_to(root)}:{line}: {room.name} includes {target}")
    return wrong


def python_sources(root: Path, room: PythonRoom) -> Iterator[Path]:
    """What is written by hand."""
    for path in sorted((root / room.folder).glob("**/*.py" if room.recursive else "*.py")):
        if not path.name.endswith("_pb2.py"):
            yield path


def imports(text: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, those within functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def may_import(room: PythonRoom, target: str) -> bool:
    if any(target == name or target.startswith(f"{name}.") for name in room.never):
        return False
    first = target.split(".")[0]
    return first in {"certiq", *sys.stdlib_module_names, *room.allowed}


def wrong_imports(root: Path, room: PythonRoom) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: {room.name} imports {target}"
        for path in python_sources(root, room)
        for line, target in imports(path.read_text(encoding="utf-8"))
        if not may_import(room, target)
    ]


def unassigned_python(root: Path) -> list[str]:
    """Modules of client/python that no room of the table speaks of."""
    known = {path for room in PYTHON_ROOMS for path in python_sources(root, room)}
    everything = PythonRoom("everything", PYTHON, frozenset())
    return [
        str(path.relative_to(root))
        for path in python_sources(root, everything)
        if path not in known
    ]


def unassigned_sources(root: Path) -> list[str]:
    """Files of server/ and client/cpp/ that no room of the table speaks of."""
    known = {path for room in ROOMS for path in sources(root, room)}
    return [
        str(path.relative_to(root))
        for top in ("server", "client/cpp")
        for path in sorted((root / top).glob("**/*"))
        if path.suffix in {".h", ".cc", ".inc"} and path not in known
    ]


def folders_without_readme(root: Path) -> list[str]:
    """Folders that hold files and no door sign.

    A folder `include` and what is below it is spoken for by the room it belongs to, a fuzz
    target's seeds by the folder of the targets, and a chart's templates by the chart.
    """
    missing = []
    for name, folders, files in os.walk(root):
        folders[:] = sorted(
            folder
            for folder in folders
            if not folder.startswith((".", "build", "__pycache__"))
            and not folder.endswith(".egg-info")
            and folder not in {"include", "corpus", "templates"}
        )
        if files and "README.md" not in files:
            missing.append(str(Path(name).relative_to(root)))
    return missing


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name.replace(" ", "_"))
def test_room_includes_only_what_it_may(room: Room) -> None:
    assert list(sources(ROOT, room)), f"{room.name}: no sources in {room.folders}"
    assert wrong_includes(ROOT, room) == []


def test_every_source_belongs_to_a_room() -> None:
    assert unassigned_sources(ROOT) == []


@pytest.mark.parametrize("room", PYTHON_ROOMS, ids=lambda room: room.name.replace(" ", "_"))
def test_python_room_imports_only_what_it_may(room: PythonRoom) -> None:
    assert list(python_sources(ROOT, room)), f"{room.name}: no modules in {room.folder}"
    assert wrong_imports(ROOT, room) == []


def test_every_python_module_belongs_to_a_room() -> None:
    assert unassigned_python(ROOT) == []


def test_nothing_defines_the_contract_beside_proto() -> None:
    contract = [
        str(path.relative_to(ROOT))
        for path in ROOT.glob("**/*.proto")
        if path.relative_to(ROOT).parts[0] != "proto"
        and not path.relative_to(ROOT).parts[0].startswith(("build", "."))
    ]
    assert contract == []


def test_every_folder_has_a_readme() -> None:
    assert folders_without_readme(ROOT) == []


# The checker itself.

PLANTED = (
    ("server/engine/factor.h", "#include <grpcpp/grpcpp.h>"),
    ("server/engine/factor.h", '#include "certiq/v1/spec.pb.h"'),
    ("server/engine/factor.h", "#include <google/protobuf/message.h>"),
    ("server/engine/factor.h", "#include <prometheus/counter.h>"),
    ("server/engine/factor.h", "#include <fstream>"),
    ("server/engine/factor.h", "#include <filesystem>"),
    ("server/engine/factor.h", "#include <cstdio>"),
    ("server/engine/factor.h", "#include <stdio.h>"),
    ("server/engine/factor.h", "#include <sys/socket.h>"),
    ("server/engine/factor.h", '#include "absl/flags/flag.h"'),
    ("server/engine/factor.h", '#include "absl/log/log.h"'),
    ("server/engine/factor.h", '#include "jobs/worker_pool.h"'),
    ("server/engine/factor.h", '  #  include   "rpc/server.h"'),
    ("server/engine/factor.h", '#include "../jobs/worker_pool.h"'),
    ("server/engine/factor.h", '#include "engine/../jobs/worker_pool.h"'),
    ("server/engine/factor.h", "#include HEADER_OF_SOMEONE"),
    ("server/engine/deep/er/kernel.cc", '#include "rpc/server.h"'),
    ("server/jobs/worker_pool.cc", '#include "rpc/convert.h"'),
    ("server/jobs/worker_pool.cc", '#include "metrics/metrics.h"'),
    ("server/jobs/worker_pool.cc", '#include "certiq/v1/spec.pb.h"'),
    ("server/jobs/worker_pool.cc", "#include <prometheus/registry.h>"),
    ("server/jobs/worker_pool.cc", '#include "absl/synchronization/mutex.h"'),
    ("server/jobs/worker_pool.cc", "#include <sqlite3.h>"),
    ("server/jobs/worker_pool.cc", "#include <fcntl.h>"),
    ("server/jobs/store/disk.cc", "#include <sys/socket.h>"),
    ("server/jobs/store/disk.cc", '#include "engine/status.h"'),
    ("server/jobs/store/disk.cc", '#include "certiq/v1/spec.pb.h"'),
    ("server/metrics/metrics.cc", "#include <grpcpp/server.h>"),
    ("server/metrics/metrics.cc", '#include "jobs/worker_pool.h"'),
    ("server/metrics/metrics.cc", '#include "certiq/v1/spec.pb.h"'),
    ("server/rpc/server.cc", "#include <prometheus/registry.h>"),
    ("server/rpc/server.cc", '#include "metrics/metrics.h"'),
    ("server/rpc/server.cc", '#include "certiq/client.h"'),
    ("server/main.cc", '#include "certiq/v1/spec.pb.h"'),
    ("server/main.cc", '#include "engine/factor.h"'),
    ("server/main.cc", "#include <grpcpp/server.h>"),
    ("server/main.cc", "#include <prometheus/registry.h>"),
    ("client/cpp/src/client.cc", '#include "engine/dtype.h"'),
    ("client/cpp/src/client.cc", '#include "rpc/convert.h"'),
    ("client/cpp/src/client.cc", '#include "server/engine/dtype.h"'),
    ("client/cpp/src/client.cc", "#include <CLI/CLI.hpp>"),
    ("client/cpp/cli/main.cc", '#include "engine/dtype.h"'),
    ("client/cpp/cli/main.cc", "#include <grpcpp/channel.h>"),
)

CLEAN = (
    ("server/engine/factor.h", "#include <cmath>"),
    ("server/engine/factor.h", "#include <Eigen/Core>"),
    ("server/engine/factor.h", '#include "absl/status/statusor.h"'),
    ("server/engine/factor.h", '#include "engine/spec.h"'),
    ("server/engine/factor.h", "// #include <grpcpp/grpcpp.h> would be wrong"),
    ("server/jobs/worker_pool.cc", '#include "engine/quantize_layer.h"'),
    ("server/jobs/worker_pool.cc", "#include <condition_variable>"),
    ("server/jobs/store/disk.cc", "#include <sqlite3.h>"),
    ("server/jobs/store/disk.cc", "#include <fcntl.h>"),
    ("server/metrics/metrics.cc", '#include "jobs/observer.h"'),
    ("server/metrics/metrics.cc", "#include <prometheus/registry.h>"),
    ("server/rpc/server.cc", '#include "certiq/v1/quantization_service.grpc.pb.h"'),
    ("server/rpc/server.cc", '#include "google/rpc/error_details.pb.h"'),
    ("server/rpc/server.cc", '#include "jobs/worker_pool.h"'),
    ("server/main.cc", '#include "rpc/server.h"'),
    ("server/main.cc", "#include <CLI/CLI.hpp>"),
    ("client/cpp/src/client.cc", '#include "certiq/client.h"'),
    ("client/cpp/src/client.cc", '#include "certiq/v1/spec.pb.h"'),
    ("client/cpp/src/client.cc", '#include "client.h"'),
    ("client/cpp/src/client.h", "#include <vector>"),
)


def plant(root: Path, file: str, line: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


PLANTED_PYTHON = (
    (f"{PACKAGE}/client.py", "import requests"),
    (f"{PACKAGE}/client.py", "from transformers import AutoModel"),
    (f"{PACKAGE}/client.py", "import certiq.torch.record"),
    (f"{PACKAGE}/client.py", "from certiq import torch"),
    (f"{PACKAGE}/client.py", "def f():\n    from certiq.model.run import main"),
    (f"{PACKAGE}/client.py", "from . import spec"),
    (f"{PACKAGE}/client.py", "from grpc_tools import protoc"),
    (f"{PACKAGE}/_proto/__init__.py", "import numpy"),
    (f"{PACKAGE}/_proto/__init__.py", "from certiq import client"),
    (f"{PYTHON}/hatch_build.py", "import numpy"),
)
CLEAN_PYTHON = (
    (f"{PACKAGE}/client.py", "import grpc.aio, numpy as np"),
    (f"{PACKAGE}/client.py", "from google.rpc import status_pb2"),
    (f"{PACKAGE}/client.py", "from certiq import aio, tensors"),
    (f"{PACKAGE}/client.py", "def f():\n    import torch\n    from tqdm.auto import tqdm"),
    (f"{PACKAGE}/client.py", "# import requests"),
    (f"{PACKAGE}/_proto/spec_pb2.py", "from certiq._proto import tensor_pb2"),
    (f"{PYTHON}/hatch_build.py", "import re, hatchling"),
)


@pytest.mark.parametrize(("file", "line"), PLANTED_PYTHON)
def test_checker_finds_a_planted_import(tmp_path: Path, file: str, line: str) -> None:
    for clean_file, clean_line in CLEAN_PYTHON:
        plant(tmp_path, clean_file, clean_line)
    plant(tmp_path, file, line)
    found = [message for room in PYTHON_ROOMS for message in wrong_imports(tmp_path, room)]
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")


def test_checker_accepts_a_clean_package(tmp_path: Path) -> None:
    for file, line in CLEAN_PYTHON:
        plant(tmp_path, file, line)
    assert [message for room in PYTHON_ROOMS for message in wrong_imports(tmp_path, room)] == []
    assert unassigned_python(tmp_path) == []
    plant(tmp_path, f"{PACKAGE}/plots/bars.py", "import numpy")
    assert unassigned_python(tmp_path) == [f"{PACKAGE}/plots/bars.py"]


@pytest.mark.parametrize(("file", "line"), PLANTED)
def test_checker_finds_a_planted_violation(tmp_path: Path, file: str, line: str) -> None:
    for clean_file, clean_line in CLEAN:
        plant(tmp_path, clean_file, clean_line)
    plant(tmp_path, file, line)
    found = [message for room in ROOMS for message in wrong_includes(tmp_path, room)]
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")


def test_checker_accepts_a_clean_tree(tmp_path: Path) -> None:
    for file, line in CLEAN:
        plant(tmp_path, file, line)
    assert [message for room in ROOMS for message in wrong_includes(tmp_path, room)] == []
    assert unassigned_sources(tmp_path) == []


def test_checker_finds_a_source_of_no_room(tmp_path: Path) -> None:
    plant(tmp_path, "server/storage/disk.cc", "#include <fstream>")
    assert unassigned_sources(tmp_path) == ["server/storage/disk.cc"]


def test_checker_finds_a_folder_without_readme(tmp_path: Path) -> None:
    plant(tmp_path, "README.md", "")
    plant(tmp_path, "server/README.md", "")
    plant(tmp_path, "server/engine/factor.h", "")
    plant(tmp_path, "build/release/CMakeCache.txt", "")
    plant(tmp_path, "client/cpp/README.md", "")
    plant(tmp_path, "client/cpp/include/certiq/client.h", "")
    assert folders_without_readme(tmp_path) == ["server/engine"]
