"""The load a certiq-server bears: rates, latencies and memory with 1 to 64 clients, over loopback.

Each measurement has a server of its own. Clients are processes, on the same machine as the server:
their CPU seconds stand beside the server's, nothing is subtracted.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

# Servers, metrics, the contract in Python.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from clients import Jobs, Quantize, StreamRows, get_job
from load_generator import Act, ClientsFailedError, Measurement, machine_cpu_seconds, measure
from programs import SERVER, Server, environment

SMALL = ((576, 576), (1024, 1024))
LARGE = (4096, 4096)
STREAM_FEATURES = (1024, 4096)
MEMORY_TOKENS = (4096, 16384, 65536)
MEMORY_FEATURES = 1024
WORKERS_CLIENTS = 8
REPEATS = 3
# Lines of the server's log that are shown; those of calls that ended well are left out.
LOG_LINES = 10
MIB = 1 << 20
# What others may take where two times are compared.
QUIET_CPUS = 0.15


def shape_of(text: str) -> tuple[int, int]:
    rows, _, features = text.partition("x")
    return int(rows), int(features)


def name_of(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def tokens_for(shape: tuple[int, int]) -> int:
    """No fewer than features, so that the layer is no easier than a real one."""
    return max(1024, shape[1])


@dataclass
class Bench:
    """Runs measurements, prints each as it ends and keeps them for the JSON file."""

    options: argparse.Namespace
    done: list[dict[str, object]] = field(default_factory=list)
    answers: dict[str, object] = field(default_factory=dict)
    build: dict[str, str] = field(default_factory=dict)
    failures: int = 0

    @contextmanager
    def server(self, workers: int | None = None) -> Iterator[Server]:
        with tempfile.TemporaryDirectory(prefix="certiq_load_") as folder:
            flags = ["--workers", str(workers or self.options.workers)]
            if self.options.storage == "disk":
                flags += ["--data_dir", str(Path(folder) / "data")]
            server = Server(Path(folder) / "server", flags, program=self.options.server)
            try:
                if not self.build:
                    self.build = next(
                        labels
                        for name, labels, _ in server.metrics().samples
                        if name == "certiq_build_info"
                    )
                yield server
                assert server.stop() == 0, server.log()
            finally:
                server.process.kill()

    def run(
        self,
        what: str,
        unit: str,
        act: Act,
        clients: int = 1,
        *,
        repeats: int = 0,
        workers: int | None = None,
        phases: bool = False,
    ) -> Measurement:
        """For --seconds, or so many times where `repeats` is given. `phases`: prints them too."""
        seconds = 0.0 if repeats else self.options.seconds
        with self.server(workers) as server:
            try:
                found = measure(server, clients, act, seconds, max(1, repeats))
            except ClientsFailedError as failed:
                self.failures += 1
                self.done.append({"what": what, "clients": clients, "failed": str(failed)})
                log = [line for line in server.log().splitlines() if " code=OK" not in line]
                print(f"{what:<38} {clients:>7} FAILED: {failed}")
                print(*log[-LOG_LINES:], sep="\n", flush=True)
                raise
        self.done.append({"what": what, "unit": unit} | found.as_json())
        rate = f"{found.rate:,.0f}" if found.rate >= 1000 else f"{found.rate:.4g}"
        print(
            f"{what:<38} {clients:>7} {rate:>12} {unit:<8} {found.seconds:>7.2f}"
            f" {found.server_cpu_seconds:>8.2f} {found.client_cpu_seconds:>8.2f}"
            f" {found.other_cpu_seconds:>8.2f}"
            f" {found.peak_rss_bytes / MIB:>8,.0f} {found.peak_reserved_bytes / MIB:>8,.0f}"
        )
        for kind, values in found.samples.items():
            if phases or not kind.startswith("certificate"):
                print(
                    f"    {kind:<34} {len(values):>7} p50 {1e3 * found.median(kind):>11,.2f} ms"
                    f"   p99 {1e3 * found.percentile(kind, 99):>11,.2f} ms"
                )
        sys.stdout.flush()
        return found

    def attempt(self, what: str, unit: str, act: Act, clients: int = 1) -> None:
        """Where nothing else depends on it: a failure is counted, and the next one goes on."""
        with suppress(ClientsFailedError):
            self.run(what, unit, act, clients)

    def say(self, key: str, value: object, text: str) -> None:
        self.answers[key] = value
        print(f"=> {text}")


def heading(title: str) -> None:
    print(f"\n## {title}")
    print(
        f"{'':<38} {'':>7} {'':>12} {'':<8} {'wall':>7} {'server':>8} {'clients':>8} {'others':>8}"
        f" {'peak RSS':>8} {'reserved':>8}\n"
        f"{'':<38} {'clients':>7} {'rate':>12} {'':<8} {'s':>7} {'CPU s':>8} {'CPU s':>8}"
        f" {'CPU s':>8} {'MiB':>8} {'MiB':>8}"
    )


def bench_accumulate(bench: Bench) -> None:
    heading("Accumulate: streams of one calibration, float16")
    for features in STREAM_FEATURES:
        act = StreamRows(features)
        for clients in bench.options.clients:
            bench.attempt(f"accumulate {features} features", "tokens/s", act, clients)


def bench_quantize(bench: Bench) -> None:
    heading("Quantize: layers with their activations, float16")
    for shape in SMALL:
        act = Quantize(shape, tokens_for(shape))
        for clients in bench.options.clients:
            bench.attempt(f"quantize {name_of(shape)}", "layers/s", act, clients)
    # One client: a layer of this size has all the workers.
    bench.attempt(f"quantize {name_of(LARGE)}", "layers/s", Quantize(LARGE, tokens_for(LARGE)))


def bench_jobs(bench: Bench) -> None:
    heading("Jobs: submitted, watched, read; each client has a calibration")
    for own_factor, kind in ((True, "own factor"), (False, "shared factor")):
        for shape in SMALL:
            act = Jobs(shape, tokens_for(shape), own_factor)
            for clients in bench.options.clients:
                bench.attempt(f"job {name_of(shape)}, {kind}", "layers/s", act, clients)
        act = Jobs(LARGE, tokens_for(LARGE), own_factor)
        bench.attempt(f"job {name_of(LARGE)}, {kind}", "layers/s", act)


def bench_unary(bench: Bench) -> None:
    heading("GetJob, nothing else to do")
    for clients in bench.options.clients:
        bench.attempt("GetJob", "calls/s", get_job, clients)


def bench_memory(bench: Bench) -> None:
    heading(f"Memory against tokens, {MEMORY_FEATURES} features")
    for kind in ("accumulate", "quantize"):
        peaks = {}
        for tokens in MEMORY_TOKENS:
            act: Act = (
                StreamRows(MEMORY_FEATURES, tokens)
                if kind == "accumulate"
                else Quantize((MEMORY_FEATURES, MEMORY_FEATURES), tokens)
            )
            unit = "tokens/s" if kind == "accumulate" else "layers/s"
            found = bench.run(f"{kind} {tokens} tokens", unit, act, repeats=1)
            peaks[tokens] = found.peak_rss_bytes
        first, last = peaks[MEMORY_TOKENS[0]], peaks[MEMORY_TOKENS[-1]]
        bench.say(
            f"memory of {kind} by tokens",
            peaks,
            f"{kind}: peak RSS of {MEMORY_TOKENS[-1]} tokens is {last / first:.2f} of that of"
            f" {MEMORY_TOKENS[0]}",
        )


def bench_workers(bench: Bench) -> None:
    heading("Two workers against one, many small layers")
    shape = SMALL[0]
    tokens = tokens_for(shape)
    acts: dict[str, Act] = {
        "quantize": Quantize(shape, tokens),
        "job": Jobs(shape, tokens, own_factor=True),
    }
    for name, act in acts.items():
        rates = {
            workers: bench.run(
                f"{name} {name_of(shape)}, --workers {workers}",
                "layers/s",
                act,
                WORKERS_CLIENTS,
                workers=workers,
            ).rate
            for workers in (1, 2)
        }
        gain = rates[2] / rates[1]
        bench.say(f"two workers against one, {name}", gain, f"{name}: {gain:.2f} times the layers")


def bench_overhead(bench: Bench) -> None:
    heading("What a small layer costs beside the engine, one client")
    shape = SMALL[0]
    tokens = tokens_for(shape)
    calls = bench.run(
        f"quantize {name_of(shape)}", "layers/s", Quantize(shape, tokens), phases=True
    )
    act = Jobs(shape, tokens, own_factor=True)
    jobs = bench.run(f"job {name_of(shape)}", "layers/s", act, phases=True)
    for name, found, kinds in (
        ("quantize", calls, ("Quantize: whole call",)),
        ("job", jobs, ("job: queued to ended", "job: created to read")),
    ):
        engine = found.median("certificate: engine")
        for kind in kinds:
            whole = found.median(kind)
            bench.say(
                f"overhead, {name}, {kind}",
                {"whole_seconds": whole, "engine_seconds": engine},
                f"{kind}: {1e3 * whole:.1f} ms, of which the engine by its certificate"
                f" {1e3 * engine:.1f} ms; beside it {1e3 * (whole - engine):.1f} ms",
            )


def engine_milliseconds(options: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Medians of the engine's own benchmark, by what it ran; CPUs that others took meanwhile."""
    command = [
        str(options.engine),
        f"--shapes={name_of(options.shape)}",
        f"--workers={options.workers}",
        f"--tokens={options.tokens}",
        "--benchmark_format=json",
        "--benchmark_filter=^(statistics|quantize)/",
        f"--benchmark_repetitions={REPEATS}",
    ]
    machine, own = machine_cpu_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    ran = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True)
    seconds = time.monotonic() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own_seconds = after.ru_utime + after.ru_stime - own.ru_utime - own.ru_stime
    others = max(0.0, machine_cpu_seconds() - machine - own_seconds) / seconds
    times: dict[str, list[float]] = {}
    for entry in json.loads(ran.stdout)["benchmarks"]:
        if entry["run_type"] == "iteration":
            assert entry["time_unit"] == "ms"
            times.setdefault(entry["name"].split("/")[0], []).append(entry["real_time"])
    return {name: statistics.median(values) for name, values in times.items()}, others


def shares(beside: dict[str, float]) -> str:
    taken = ", ".join(f"{cpus:.2f} CPUs beside the {what}" for what, cpus in beside.items())
    busy = max(beside.values()) > QUIET_CPUS
    return taken + ("; NOT a quiet machine, the ratio says little" if busy else "")


def bench_engine(bench: Bench) -> None:
    options = bench.options
    heading("The main job: the service against the engine in one process")
    what = f"main job {name_of(options.shape)}, {options.tokens} tokens"
    act = Quantize(options.shape, options.tokens)
    found = bench.run(what, "layers/s", act, repeats=REPEATS, phases=True)
    service = found.median("Quantize: whole call")
    bench.say(
        "main job, service seconds",
        service,
        f"service: {service:.3f} s, median of {REPEATS}; the client's own CPU took"
        f" {found.client_cpu_seconds / REPEATS:.3f} s of each",
    )
    if not options.engine.is_file():
        print(f"=> no comparison with the engine: {options.engine.name} is not built")
        return
    parts, others = engine_milliseconds(options)
    missing = {"statistics", "quantize"} - set(parts)
    assert not missing, f"{options.engine.name} ran no {missing}"
    engine = 1e-3 * sum(parts.values())
    bench.say(
        "main job, engine seconds",
        engine,
        f"engine: {engine:.3f} s = statistics {parts['statistics']:.0f} ms + quantize"
        f" {parts['quantize']:.0f} ms, medians of {REPEATS}",
    )
    ratio = service / engine
    beside = {"service": found.other_cpu_seconds / found.seconds, "engine": others}
    bench.say("CPUs that others took beside", beside, "others took " + shares(beside))
    bench.say("main job, service over engine", ratio, f"service / engine = {ratio:.3f}")


GROUPS: dict[str, Callable[[Bench], None]] = {
    "accumulate": bench_accumulate,
    "quantize": bench_quantize,
    "jobs": bench_jobs,
    "unary": bench_unary,
    "memory": bench_memory,
    "workers": bench_workers,
    "overhead": bench_overhead,
    "engine": bench_engine,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ",".join(GROUPS)
    parser.add_argument("--only", default=names, help=f"some of {names}")
    parser.add_argument("--clients", default="1,4,16,64", help="how many at a time")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--workers", type=int, default=2, help="of the server")
    parser.add_argument("--storage", choices=("memory", "disk"), default="memory")
    parser.add_argument("--server", type=Path, default=SERVER, help="the program")
    parser.add_argument("--engine", type=Path, help="engine_bench; default: beside the server")
    parser.add_argument("--no-engine", action="store_true", help="leave the main job out")
    parser.add_argument("--shape", type=shape_of, default=LARGE, help="of the main job, RxN")
    parser.add_argument("--tokens", type=int, default=4096, help="of the main job")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    options = parser.parse_args()
    options.clients = [int(text) for text in options.clients.split(",")]
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(GROUPS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {names}")
    if min(options.clients) < 1:
        parser.error("--clients: at least 1")
    if not options.server.is_file():
        parser.error(f"{options.server} is not built")
    options.engine = options.engine or options.server.parent / "engine_bench"
    return options


def main() -> int:
    options = parse()
    bench = Bench(options)
    print(
        f"{os.cpu_count()} CPUs for the server (--workers {options.workers}, storage in"
        f" {options.storage}) and for its clients, each of which is a process."
    )
    for name, group in GROUPS.items():
        if name == "engine" and options.no_engine:
            print("\nThe main job against the engine: left out.")
        elif name in options.only:
            with suppress(ClientsFailedError):
                group(bench)
    if options.json is not None:
        settings = {
            key: value if isinstance(value, (int, float, list, tuple)) else str(value)
            for key, value in vars(options).items()
        }
        everything = {
            "cpus": os.cpu_count(),
            "build": bench.build,
            "settings": settings,
            "measurements": bench.done,
            "answers": bench.answers,
        }
        options.json.write_text(json.dumps(everything, indent=2) + "\n")
    if bench.failures:
        print(f"\n{bench.failures} measurements failed")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
