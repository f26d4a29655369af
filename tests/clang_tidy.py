"""Runs clang-tidy over our own sources, and only over those that changed since they passed.

python3 tests/clang_tidy.py BUILD_DIR FOLDER..., where BUILD_DIR has compile_commands.json and the
generated headers, and sources are those below the folders. A source that passed leaves a stamp
under a hash of all it depends on: itself, our headers it reaches, the contract, its flags, the
configuration and the system's libraries. Stamps are kept in $XDG_CACHE_HOME/certiq/tidy (~/.cache
where that is not set), for all clones.

Most of the time goes into the headers of libraries, so sources with the same flags are read as one,
BATCH at a time. Where that finds something, or does not compile because two of them define the same
name, each is read on its own, and only that counts.
"""

import concurrent.futures
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "clang-tidy-14"
OWN = tuple(ROOT / folder for folder in ("server", "client", "tests"))
BATCH = 8
INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)


def own_commands(build: Path, folders: list[Path]) -> dict[Path, list[str]]:
    """The first command of each source below `folders`, without what only gcc or -Werror minds.

    A source compiled once an instruction set is one source.
    """
    commands: dict[Path, list[str]] = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        source = Path(entry["directory"], entry["file"]).resolve()
        if source in commands or not any(source.is_relative_to(folder) for folder in folders):
            continue
        arguments = entry.get("arguments") or shlex.split(entry["command"])
        commands[source] = [argument for argument in arguments if argument != "-Werror"]
    return commands


@cache
def content(path: Path) -> bytes:
    return path.read_bytes()


@cache
def is_file(path: Path) -> bool:
    return path.is_file()


def include_folders(arguments: list[str]) -> list[Path]:
    """Those of our own; everything else is the system's or generated."""
    named = [
        argument[2:] for argument in arguments if argument.startswith("-I") and argument != "-I"
    ]
    named += [value for flag, value in itertools.pairwise(arguments) if flag == "-I"]
    folders = [Path(name).resolve() for name in named]
    return [
        folder
        for folder in folders
        if folder == ROOT or any(folder.is_relative_to(own) for own in OWN)
    ]


def dependencies(source: Path, folders: list[Path]) -> list[Path]:
    """The source and every header of ours that it reaches."""
    seen = {source}
    waiting = [source]
    while waiting:
        file = waiting.pop()
        for match in INCLUDE.finditer(content(file)):
            name = match.group(1).decode()
            for folder in (file.parent, *folders):
                header = Path(os.path.normpath(folder / name))
                if header not in seen and is_file(header):
                    seen.add(header)
                    waiting.append(header)
    return sorted(seen)


def common_parts() -> bytes:
    """What every source depends on."""
    queries = ([PROGRAM, "--version"], ["dpkg-query", "-W", "lib*-dev"])
    parts = [subprocess.run(query, capture_output=True, check=True).stdout for query in queries]
    parts.append((ROOT / ".clang-tidy").read_bytes())
    parts += [contract.read_bytes() for contract in sorted((ROOT / "proto").glob("**/*.proto"))]
    return b"".join(parts)


def key(source: Path, arguments: list[str], common: bytes) -> str:
    digest = hashlib.sha256(common)
    # The same in every clone.
    digest.update(shlex.join(arguments).replace(str(ROOT), ".").encode())
    for file in dependencies(source, include_folders(arguments)):
        digest.update(str(file.relative_to(ROOT)).encode())
        digest.update(hashlib.sha256(content(file)).digest())
    return digest.hexdigest()


def tidy(source: Path, database: Path) -> tuple[bool, str]:
    done = subprocess.run(
        [PROGRAM, "--quiet", "-p", str(database), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout
    if done.returncode != 0:
        output += "\n".join(
            line for line in done.stderr.splitlines() if "warnings generated" not in line
        )
    return done.returncode == 0, output.strip()


def flags_of(command: list[str]) -> list[str]:
    """A command without its source and without the files that it writes."""
    flags = []
    arguments = iter(command)
    for argument in arguments:
        if argument in {"-c", "-o", "-MF", "-MT", "-MQ"}:
            next(arguments)
        else:
            flags.append(argument)
    return flags


def batches(stale: list[Path], commands: dict[Path, list[str]]) -> list[list[Path]]:
    """Sources with the same flags, neighbours together."""
    groups: dict[str, list[Path]] = {}
    for source in sorted(stale):
        groups.setdefault(shlex.join(flags_of(commands[source])), []).append(source)
    return [
        group[first : first + BATCH]
        for group in groups.values()
        for first in range(0, len(group), BATCH)
    ]


def write_database(folder: Path, commands: dict[Path, list[str]]) -> None:
    (folder / "compile_commands.json").write_text(
        json.dumps(
            [
                {"directory": str(folder.parent), "file": str(source), "arguments": flags}
                for source, flags in commands.items()
            ]
        )
    )


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    build = Path(arguments[0]).resolve()
    commands = own_commands(build, [ROOT / folder for folder in arguments[1:]])
    if not commands:
        print(f"clang-tidy: no sources of ours in {build}/compile_commands.json", file=sys.stderr)
        return 1

    common = common_parts()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "certiq" / "tidy"
    folder.mkdir(parents=True, exist_ok=True)
    stamps = {source: folder / key(source, flags, common) for source, flags in commands.items()}
    stale = [source for source in commands if not stamps[source].is_file()]
    print(f"clang-tidy: {len(commands)} sources, {len(stale)} to check", flush=True)

    database = build / "tidy"
    shutil.rmtree(database, ignore_errors=True)
    database.mkdir()
    together: dict[Path, list[Path]] = {}
    for number, batch in enumerate(batches(stale, commands)):
        if len(batch) == 1:
            together[batch[0]] = batch
            continue
        source = database / f"batch_{number}.cc"
        lines = (f'#include "{one}"  // NOLINT(bugprone-suspicious-include)\n' for one in batch)
        source.write_text("".join(lines))
        commands[source] = [*flags_of(commands[batch[0]]), "-c", str(source)]
        together[source] = batch
    write_database(database, commands)

    failed = 0
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # What takes longest first, so that nothing starts when the others are done.
        waiting = {
            pool.submit(tidy, source, database): source
            for source in sorted(
                together, key=lambda source: -sum(one.stat().st_size for one in together[source])
            )
        }
        while waiting:
            done, _ = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for run in done:
                source = waiting.pop(run)
                passed, output = run.result()
                if passed:
                    for one in together.get(source, [source]):
                        stamps[one].touch()
                elif len(together.get(source, [source])) > 1:
                    waiting |= {pool.submit(tidy, one, database): one for one in together[source]}
                else:
                    failed += 1
                    print(f"clang-tidy: {source.relative_to(ROOT)}\n{output}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
