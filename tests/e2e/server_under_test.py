"""A server that is killed again and again, and what its clients do about it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import certiq
import grpc
from certiq.errors import from_rpc_error
from programs import Server, spawn_server
from raw import Calls
from work import client_of

T = TypeVar("T")
RETRIED = (certiq.Unavailable, certiq.Cancelled, certiq.Aborted)
# No call that is tried again may take longer, with all its tries.
STUBBORN_SECONDS = 120.0


class ServerUnderTest:
    """One data directory, and the server that has it just now.

    Each life has a port of its own, so retries are those of persist() and not the package's, whose
    clients stay with one address.
    """

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self._folder = folder
        self.data = folder / "data"
        self._flags = [*flags, "--data_dir", str(self.data)]
        self._lives = 0
        self.start()

    def _next_folder(self) -> Path:
        self._lives += 1
        return self._folder / f"life_{self._lives}"

    def start(self) -> None:
        self.server = Server(self._next_folder(), self._flags)
        # Older channels are left alone: calls may still be ending on them.
        self.calls = Calls(self.server)
        # Layers travel in several messages.
        self.client = client_of(self.server, chunk_bytes=1 << 14)

    def kill(self) -> None:
        status = self.server.process.poll()
        assert status is None, f"ended by itself with {status}:\n{self.server.log()}"
        self.server.process.kill()
        self.server.wait()

    def kill_while_starting(self, after: float) -> None:
        """One more life, which may end before it has begun."""
        process = spawn_server(self._next_folder(), self._flags)
        time.sleep(after)
        assert process.poll() is None, "ended by itself while starting"
        process.kill()
        process.wait()

    def calibration(self, calibration_id: str) -> certiq.Calibration:
        return self.client.get_calibration(calibration_id)

    def job(self, job_id: str) -> certiq.Job:
        return self.client.get_job(job_id)


def persist(call: Callable[[], T]) -> T:
    """Tries again as the contract allows. The call is to take its client from the server under
    test each time."""
    end = time.monotonic() + STUBBORN_SECONDS
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            failed = from_rpc_error(error)
        except certiq.Error as error:
            failed = error
        if not isinstance(failed, RETRIED) or time.monotonic() > end:
            raise failed
        time.sleep(0.02)
