"""Which module may include or import which: C++ by folders, the Python package by packages.

Debian puts every library's headers into /usr/include, so an include that breaks the order compiles.
This test reads the #include lines of every module and compares them with the table below; its last
part plants violations and expects to find them.
"""

import ast
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
FILE_CALLS = ("fcntl.h", "sys/file.h", "sys/stat.h", "sys/statvfs.h", "sys/types.h", "unistd.h")
SOCKETS = (
    *("arpa/inet.h", "netdb.h", "netinet/in.h", "netinet/tcp.h", "sys/socket.h", "sys/un.h"),
    "unistd.h",
)
# Values, strings, errors: no clocks, flags or logs, and no locks, whose library ThreadSanitizer
# cannot see into.
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
MESSAGES = (
    "certiq/v1/*.pb.h",
    "certiq/v1/readers_table.h",
    "google/protobuf/",
    "google/rpc/*.pb.h",
)
STORED = ("certiq/internal/*.pb.h",)
STUBS = ("certiq/v1/*.grpc.pb.h",)
GRPC = ("grpc/", "grpcpp/")
# All that a client shares with the server: macros and annotated locks, which need no library.
CLIENT_BASE = ("base/status_macros.h", "base/mutex.h")
# What the other modules report to; the rest of observability/ sees Prometheus.
OBSERVERS = ("observability/*observer*.h",)


@dataclass(frozen=True)
class Module:
    """Files that share the right to include.

    `allowed` holds prefixes that end in "/", patterns with one "*", and whole names; "*" stays
    within a folder. What matches `never` is refused all the same. Names without a folder are the
    module's own if a file of that name lies in one of its folders.
    """

    name: str
    folders: tuple[str, ...]
    allowed: tuple[str, ...]
    never: tuple[str, ...] = ()
    without_standard: frozenset[str] = frozenset()
    recursive: bool = True


# The engine's folders, each of which may include those before it, and these headers.
ENGINE_ORDER = (
    *("kernels", "linalg", "gram", "scales", "methods", "damping", "certify", "export"),
)
ENGINE_VALUES = ("engine/run_context.h", "engine/spec.h", "engine/certificate.h")
# sys/mman.h: large pages.
ENGINE_SYSTEM = ("base/", "Eigen/", "sys/mman.h", *ABSL_VALUES)

MODULES = (
    # Listening sockets; unistd.h: how much memory the machine has, too. openssl has SHA-256.
    Module(
        "base",
        ("server/base",),
        ("base/", "openssl/", "sys/stat.h", *SOCKETS, *ABSL_VALUES),
    ),
    Module(
        "engine",
        ("server/engine",),
        ("engine/", *ENGINE_SYSTEM),
        without_standard=FILES,
        recursive=False,
    ),
    *(
        Module(
            f"engine {folder}",
            (f"server/engine/{folder}",),
            (
                *(f"engine/{earlier}/" for earlier in ENGINE_ORDER[: index + 1]),
                *ENGINE_VALUES,
                *ENGINE_SYSTEM,
            ),
            without_standard=FILES,
        )
        for index, folder in enumerate(ENGINE_ORDER)
    ),
    # Messages in and out, for all that is behind the calls.
    Module(
        "contract",
        ("server/contract",),
        ("contract/", "base/", "engine/", *MESSAGES, *ABSL_VALUES),
        never=STUBS,
    ),
    Module(
        "runtime",
        ("server/runtime",),
        ("runtime/", "base/", "engine/run_context.h", *OBSERVERS, *ABSL_VALUES),
    ),
    # Files are written only here.
    Module(
        "store",
        ("server/store",),
        (
            *("store/", "contract/", "base/", "sqlite3.h", "xxhash.h"),
            *(*FILE_CALLS, *MESSAGES, *STORED, *OBSERVERS, *ABSL_VALUES),
        ),
        never=STUBS,
    ),
    Module(
        "calibration",
        ("server/calibration",),
        (
            *("calibration/", "store/", "runtime/", "contract/", "engine/", "base/"),
            *(*STORED, *OBSERVERS, *ABSL_VALUES),
        ),
    ),
    Module(
        "job",
        ("server/job",),
        (
            *("job/", "calibration/", "store/", "runtime/", "contract/", "engine/", "base/"),
            *(*MESSAGES, *STORED, *OBSERVERS, *ABSL_VALUES),
        ),
        never=STUBS,
    ),
    Module(
        "observability",
        ("server/observability",),
        (
            *("observability/", "contract/", "engine/", "base/", "prometheus/", "absl/"),
            *("runtime/periodic_task.h", "microhttpd.h", "sys/socket.h"),
            # The log.
            *("spdlog/", "nlohmann/"),
        ),
    ),
    # Connections are accepted before gRPC has them; openssl has certificates; tokens and
    # certificates are files that change.
    Module(
        "rpc",
        ("server/rpc",),
        (
            *("rpc/", "backend.h", "job/", "calibration/", "store/", "runtime/", "contract/"),
            *("engine/", "base/", "absl/", "openssl/", "poll.h", "sys/eventfd.h", "sys/stat.h"),
            *(*OBSERVERS, *MESSAGES, *GRPC, *SOCKETS, *FILE_CALLS),
        ),
    ),
    Module(
        "main",
        ("server",),
        (
            *("backend.h", "rpc/", "observability/", "job/", "calibration/", "store/", "runtime/"),
            *("base/", "CLI/", "spdlog/", "absl/", *POSIX),
            # The engine's version and instruction set, for the log and the metrics.
            "engine/quantize_layer.h",
        ),
        recursive=False,
    ),
    Module(
        "client library",
        ("client/cpp/include", "client/cpp/src"),
        (
            *("certiq/*.h", *CLIENT_BASE, "nlohmann/", "openssl/", "absl/"),
            *(*MESSAGES, *GRPC, *POSIX),
        ),
    ),
    # Arithmetic of its own, so that it does not repeat the engine's mistakes.
    Module(
        "verifier",
        ("client/cpp/verify",),
        ("certiq/*.h", *CLIENT_BASE, "Eigen/", "openssl/", "absl/", *MESSAGES),
        never=STUBS,
    ),
    Module(
        "command line",
        ("client/cpp/cli",),
        (
            *("certiq/*.h", *CLIENT_BASE, "verify.h", "nlohmann/", "CLI/", "absl/"),
            *(*MESSAGES, *POSIX),
        ),
        never=STUBS,
    ),
)

# (file, include) that the table forbids and the tree still has. One that is gone leaves the list.
EXCEPTIONS: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class PythonModule:
    """Modules that share the right to import: the standard library, `allowed`, and of certiq
    itself everything but `never`."""

    name: str
    folder: str
    allowed: frozenset[str]
    never: tuple[str, ...] = ()
    recursive: bool = True


PYTHON = "client/python"
PACKAGE = f"{PYTHON}/src/certiq"
PYTHON_MODULES = (
    # google has protobuf and google.rpc; torch is imported for those who bring its tensors, tqdm
    # for those who ask for a bar.
    PythonModule(
        "python client",
        PACKAGE,
        frozenset({"google", "grpc", "ml_dtypes", "numpy", "torch", "tqdm"}),
        never=("certiq.torch", "certiq.model", "certiq.experiments"),
        recursive=False,
    ),
    PythonModule(
        "python torch",
        f"{PACKAGE}/torch",
        # google.protobuf's messages come from certiq itself; transformers is not needed.
        frozenset({"numpy", "torch"}),
        never=("certiq.model", "certiq.experiments"),
    ),
    PythonModule(
        "python model",
        f"{PACKAGE}/model",
        frozenset(
            {"accelerate", "gguf", "google", "greenlet", "ml_dtypes", "numpy", "safetensors"}
            | {"torch", "tqdm", "transformers", "yaml"}
        ),
        never=("certiq.experiments",),
    ),
    PythonModule(
        "python experiments",
        f"{PACKAGE}/experiments",
        frozenset({"matplotlib", "ml_dtypes", "numpy", "safetensors"}),
        never=("certiq.torch", "certiq.model"),
    ),
    PythonModule("python contract", f"{PACKAGE}/_proto", frozenset({"google"}), never=("certiq",)),
    PythonModule(
        "python build", PYTHON, frozenset({"grpc_tools", "hatchling"}), ("certiq",), recursive=False
    ),
)

INCLUDE = re.compile(r"^[ \t]*#[ \t]*(?:include|include_next|import)\b[ \t]*(.*)$", re.MULTILINE)
TARGET = re.compile(r'(?:<([^>]+)>|"([^"]+)")')


def sources(root: Path, module: Module) -> Iterator[Path]:
    for folder in module.folders:
        pattern = "**/*" if module.recursive else "*"
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


def allowed(root: Path, module: Module, target: str) -> bool:
    if ".." in target.split("/") or target.startswith("/"):
        return False
    if target in STANDARD:
        return target not in module.without_standard
    if "/" not in target and any((root / folder / target).is_file() for folder in module.folders):
        return True
    if any(matches(target, pattern) for pattern in module.never):
        return False
    return any(matches(target, pattern) for pattern in module.allowed)


def wrong_includes(
    root: Path, module: Module, exceptions: frozenset[tuple[str, str]] = frozenset()
) -> list[str]:
    """`file:line: module includes target` of each include that is not allowed."""
    wrong = []
    for path in sources(root, module):
        text = path.read_text(encoding="utf-8")
        for match in INCLUDE.finditer(text):
            parsed = TARGET.match(match.group(1))
            target = (parsed.group(1) or parsed.group(2)) if parsed else match.group(1).strip()
            name = str(path.relative_to(root))
            if (name, target) in exceptions:
                continue
            if parsed is None or not allowed(root, module, target):
                line = text.count("\n", 0, match.start()) + 1
                wrong.append(f"{name}:{line}: {module.name} includes {target}")
    return wrong


def python_sources(root: Path, module: PythonModule) -> Iterator[Path]:
    """What is written by hand."""
    for path in sorted((root / module.folder).glob("**/*.py" if module.recursive else "*.py")):
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


def may_import(module: PythonModule, target: str) -> bool:
    if any(target == name or target.startswith(f"{name}.") for name in module.never):
        return False
    first = target.split(".")[0]
    return first in {"certiq", *sys.stdlib_module_names, *module.allowed}


def wrong_imports(root: Path, module: PythonModule) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: {module.name} imports {target}"
        for path in python_sources(root, module)
        for line, target in imports(path.read_text(encoding="utf-8"))
        if not may_import(module, target)
    ]


def unassigned_python(root: Path) -> list[str]:
    """Modules of client/python that no module of the table speaks of."""
    known = {path for module in PYTHON_MODULES for path in python_sources(root, module)}
    everything = PythonModule("everything", PYTHON, frozenset())
    return [
        str(path.relative_to(root))
        for path in python_sources(root, everything)
        if path not in known
    ]


def unassigned_sources(root: Path) -> list[str]:
    """Files of server/ and client/cpp/ that no module of the table speaks of."""
    known = {path for module in MODULES for path in sources(root, module)}
    return [
        str(path.relative_to(root))
        for top in ("server", "client/cpp")
        for path in sorted((root / top).glob("**/*"))
        if path.suffix in {".h", ".cc", ".inc"} and path not in known
    ]


def folders_without_readme(root: Path) -> list[str]:
    """Folders that hold files and no README.

    A module's README covers its folder `include` and, in server/, its folders of sources; that of
    tests/ covers folders of sources alone, that of tests/data what lies below it, that of the fuzz
    targets their seeds, and that of the chart its templates.
    """
    missing = []
    for name, folders, files in os.walk(root):
        here = Path(name).relative_to(root)
        folders[:] = sorted(
            folder
            for folder in folders
            if not folder.startswith((".", "build", "__pycache__"))
            and not folder.endswith(".egg-info")
            and folder not in {"include", "corpus", "templates"}
        )
        if not files or "README.md" in files:
            continue
        sources_only = all(Path(file).suffix in {".h", ".cc", ".txt"} for file in files)
        within_module = len(here.parts) == 3 and here.parts[0] == "server"
        of_tests = len(here.parts) == 2 and here.parts[0] == "tests"
        is_data = here.parts[:2] == ("tests", "data") and len(here.parts) > 2
        if not is_data and not (sources_only and (within_module or of_tests)):
            missing.append(str(here))
    return missing


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name.replace(" ", "_"))
def test_module_includes_only_what_it_may(module: Module) -> None:
    assert list(sources(ROOT, module)), f"{module.name}: no sources in {module.folders}"
    assert wrong_includes(ROOT, module, EXCEPTIONS) == []


def test_exceptions_are_needed() -> None:
    found = {
        (message.split(":")[0], message.split(" includes ")[1])
        for module in MODULES
        for message in wrong_includes(ROOT, module)
    }
    assert EXCEPTIONS - found == set()


def test_every_source_belongs_to_a_module() -> None:
    assert unassigned_sources(ROOT) == []


@pytest.mark.parametrize("module", PYTHON_MODULES, ids=lambda module: module.name.replace(" ", "_"))
def test_python_module_imports_only_what_it_may(module: PythonModule) -> None:
    assert list(python_sources(ROOT, module)), f"{module.name}: no modules in {module.folder}"
    assert wrong_imports(ROOT, module) == []


def test_every_python_module_belongs_to_a_module() -> None:
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
    ("server/engine/kernels/simd.h", "#include <grpcpp/grpcpp.h>"),
    ("server/engine/kernels/simd.h", '#include "certiq/v1/spec.pb.h"'),
    ("server/engine/kernels/simd.h", "#include <google/protobuf/message.h>"),
    ("server/engine/kernels/simd.h", "#include <prometheus/counter.h>"),
    ("server/engine/kernels/simd.h", "#include <fstream>"),
    ("server/engine/kernels/simd.h", "#include <filesystem>"),
    ("server/engine/kernels/simd.h", "#include <cstdio>"),
    ("server/engine/kernels/simd.h", "#include <stdio.h>"),
    ("server/engine/kernels/simd.h", "#include <sys/socket.h>"),
    ("server/engine/kernels/simd.h", '#include "absl/flags/flag.h"'),
    ("server/engine/kernels/simd.h", '#include "absl/log/log.h"'),
    ("server/engine/kernels/simd.h", '#include "runtime/worker_pool.h"'),
    ("server/engine/kernels/simd.h", '  #  include   "rpc/transport/server.h"'),
    ("server/engine/kernels/simd.h", '#include "../runtime/worker_pool.h"'),
    ("server/engine/kernels/simd.h", '#include "engine/../runtime/worker_pool.h"'),
    ("server/engine/kernels/simd.h", "#include HEADER_OF_SOMEONE"),
    ("server/engine/kernels/simd.h", '#include "engine/linalg/cholesky.h"'),
    ("server/engine/kernels/simd.h", '#include "engine/quantize_layer.h"'),
    ("server/engine/kernels/deep/er/kernel.cc", '#include "rpc/transport/server.h"'),
    ("server/engine/quantize_layer.cc", '#include "runtime/worker_pool.h"'),
    ("server/engine/quantize_layer.cc", "#include <iostream>"),
    ("server/engine/scales/qparams.cc", '#include "engine/methods/optq.h"'),
    ("server/engine/certify/certify.cc", '#include "engine/export/packing.h"'),
    ("server/base/status.cc", '#include "engine/spec.h"'),
    ("server/base/status.cc", '#include "google/rpc/status.pb.h"'),
    ("server/base/status.cc", '#include "absl/synchronization/mutex.h"'),
    ("server/runtime/worker_pool.cc", '#include "contract/enums.h"'),
    ("server/runtime/worker_pool.cc", '#include "observability/metrics.h"'),
    ("server/runtime/worker_pool.cc", '#include "certiq/v1/spec.pb.h"'),
    ("server/runtime/worker_pool.cc", "#include <prometheus/registry.h>"),
    ("server/runtime/worker_pool.cc", '#include "absl/synchronization/mutex.h"'),
    ("server/runtime/worker_pool.cc", "#include <sqlite3.h>"),
    ("server/runtime/worker_pool.cc", "#include <fcntl.h>"),
    ("server/runtime/worker_pool.cc", '#include "engine/quantize_layer.h"'),
    ("server/store/disk.cc", "#include <sys/socket.h>"),
    ("server/store/disk.cc", '#include "engine/spec.h"'),
    ("server/store/disk.cc", '#include "job/run.h"'),
    ("server/store/disk.cc", '#include "certiq/v1/job_service.grpc.pb.h"'),
    ("server/store/disk.cc", "#include <grpcpp/server.h>"),
    ("server/calibration/calibration.cc", '#include "job/run.h"'),
    ("server/calibration/calibration.cc", "#include <grpcpp/server.h>"),
    ("server/calibration/calibration.cc", "#include <prometheus/registry.h>"),
    ("server/job/run.cc", '#include "rpc/calls/call.h"'),
    ("server/job/run.cc", '#include "certiq/v1/job_service.grpc.pb.h"'),
    ("server/job/run.cc", "#include <grpcpp/server.h>"),
    ("server/job/run.cc", '#include "observability/log.h"'),
    ("server/contract/enums.h", "#include <grpcpp/support/status.h>"),
    ("server/contract/enums.h", '#include "certiq/v1/job_service.grpc.pb.h"'),
    ("server/contract/enums.h", '#include "store/catalog.h"'),
    ("server/observability/metrics.cc", "#include <grpcpp/server.h>"),
    ("server/observability/metrics.cc", '#include "runtime/worker_pool.h"'),
    ("server/observability/metrics.cc", '#include "certiq/v1/spec.pb.h"'),
    ("server/rpc/transport/server.cc", "#include <prometheus/registry.h>"),
    ("server/rpc/transport/server.cc", '#include "observability/metrics.h"'),
    ("server/rpc/transport/server.cc", '#include "certiq/client.h"'),
    ("server/main.cc", '#include "certiq/v1/spec.pb.h"'),
    ("server/main.cc", '#include "engine/linalg/cholesky.h"'),
    ("server/main.cc", "#include <grpcpp/server.h>"),
    ("server/main.cc", "#include <prometheus/registry.h>"),
    ("client/cpp/src/client.cc", '#include "engine/kernels/dtype.h"'),
    ("client/cpp/src/client.cc", '#include "base/status.h"'),
    ("client/cpp/src/client.cc", '#include "server/base/status_macros.h"'),
    ("client/cpp/src/client.cc", "#include <CLI/CLI.hpp>"),
    ("client/cpp/verify/verify.cc", '#include "certiq/v1/job_service.grpc.pb.h"'),
    ("client/cpp/cli/main.cc", '#include "engine/kernels/dtype.h"'),
    ("client/cpp/cli/main.cc", "#include <grpcpp/channel.h>"),
)

CLEAN = (
    ("server/engine/kernels/simd.h", "#include <cmath>"),
    ("server/engine/kernels/simd.h", "#include <Eigen/Core>"),
    ("server/engine/kernels/simd.h", '#include "absl/status/statusor.h"'),
    ("server/engine/kernels/simd.h", '#include "engine/spec.h"'),
    ("server/engine/kernels/simd.h", "// #include <grpcpp/grpcpp.h> would be wrong"),
    ("server/engine/scales/qparams.cc", '#include "engine/linalg/cholesky.h"'),
    ("server/engine/scales/qparams.cc", '#include "base/status.h"'),
    ("server/engine/quantize_layer.cc", '#include "engine/export/packing.h"'),
    ("server/engine/certify/certify.cc", '#include "engine/methods/optq.h"'),
    ("server/base/status.cc", "#include <openssl/evp.h>"),
    ("server/base/status.cc", "#include <mutex>"),
    ("server/runtime/worker_pool.cc", '#include "engine/run_context.h"'),
    ("server/runtime/worker_pool.cc", '#include "observability/observer.h"'),
    ("server/runtime/worker_pool.cc", "#include <condition_variable>"),
    ("server/store/disk.cc", "#include <sqlite3.h>"),
    ("server/store/disk.cc", "#include <fcntl.h>"),
    ("server/store/disk.cc", '#include "certiq/internal/stored.pb.h"'),
    ("server/calibration/calibration.cc", '#include "store/catalog.h"'),
    ("server/job/run.cc", '#include "certiq/v1/job_service.pb.h"'),
    ("server/job/run.cc", '#include "observability/call_observer.h"'),
    ("server/contract/enums.h", '#include "certiq/v1/spec.pb.h"'),
    ("server/contract/enums.h", "#include <google/protobuf/duration.pb.h>"),
    ("server/observability/metrics.cc", "#include <prometheus/registry.h>"),
    ("server/observability/metrics.cc", '#include "observability/log.h"'),
    ("server/rpc/transport/server.cc", '#include "certiq/v1/quantization_service.grpc.pb.h"'),
    ("server/rpc/transport/server.cc", '#include "google/rpc/error_details.pb.h"'),
    ("server/rpc/transport/server.cc", '#include "runtime/worker_pool.h"'),
    ("server/main.cc", '#include "rpc/transport/server.h"'),
    ("server/main.cc", "#include <CLI/CLI.hpp>"),
    ("client/cpp/src/client.cc", '#include "certiq/client.h"'),
    ("client/cpp/src/client.cc", '#include "certiq/v1/spec.pb.h"'),
    ("client/cpp/src/client.cc", '#include "base/status_macros.h"'),
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
    found = [message for module in PYTHON_MODULES for message in wrong_imports(tmp_path, module)]
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")


def test_checker_accepts_a_clean_package(tmp_path: Path) -> None:
    for file, line in CLEAN_PYTHON:
        plant(tmp_path, file, line)
    assert [
        message for module in PYTHON_MODULES for message in wrong_imports(tmp_path, module)
    ] == []
    assert unassigned_python(tmp_path) == []
    plant(tmp_path, f"{PACKAGE}/plots/bars.py", "import numpy")
    assert unassigned_python(tmp_path) == [f"{PACKAGE}/plots/bars.py"]


@pytest.mark.parametrize(("file", "line"), PLANTED)
def test_checker_finds_a_planted_violation(tmp_path: Path, file: str, line: str) -> None:
    for clean_file, clean_line in CLEAN:
        plant(tmp_path, clean_file, clean_line)
    plant(tmp_path, file, line)
    found = [message for module in MODULES for message in wrong_includes(tmp_path, module)]
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")


def test_checker_accepts_a_clean_tree(tmp_path: Path) -> None:
    for file, line in CLEAN:
        plant(tmp_path, file, line)
    assert [message for module in MODULES for message in wrong_includes(tmp_path, module)] == []
    assert unassigned_sources(tmp_path) == []


def test_checker_finds_a_source_of_no_module(tmp_path: Path) -> None:
    plant(tmp_path, "server/storage/disk.cc", "#include <fstream>")
    assert unassigned_sources(tmp_path) == ["server/storage/disk.cc"]


def test_checker_finds_a_folder_without_readme(tmp_path: Path) -> None:
    plant(tmp_path, "README.md", "")
    plant(tmp_path, "server/README.md", "")
    plant(tmp_path, "server/engine/spec.h", "")
    plant(tmp_path, "server/rpc/README.md", "")
    plant(tmp_path, "server/rpc/calls/call.h", "")
    plant(tmp_path, "build/release/CMakeCache.txt", "")
    plant(tmp_path, "client/cpp/README.md", "")
    plant(tmp_path, "client/cpp/include/certiq/client.h", "")
    assert folders_without_readme(tmp_path) == ["server/engine"]
