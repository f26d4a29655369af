"""Progress events of a call, and the bars that show them."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from certiq._proto.quantization_service_pb2 import Phase
from certiq.errors import Error, invalid


@dataclass(frozen=True)
class Upload:
    """Tensor bytes of the request handed to the connection."""

    bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Stage:
    """A phase of the server's work ("queue", "factor", "round", ...) and its fraction in [0, 1]."""

    phase: str
    fraction: float


@dataclass(frozen=True)
class Retrying:
    """The try failed; another one follows after `delay` seconds."""

    error: Error
    attempt: int
    delay: float


Event = Upload | Stage | Retrying
Callback = Callable[[Event], None]
ProgressLike = Callback | bool | None
"""None or False: silent; True: a bar by tqdm; or a function that gets every event, one at a time
but from any thread."""


def phase_name(phase: int) -> str:
    known = {number: name for name, number in Phase.items()}
    return known.get(phase, "PHASE_UNSPECIFIED").removeprefix("PHASE_").lower()


def new_bar(tqdm: Any, **options: Any) -> Any:
    """A bar of this tqdm class; None: the one that suits the terminal or the notebook."""
    if tqdm is None:
        try:
            from tqdm.auto import tqdm as automatic
        except ImportError:
            raise ImportError(
                "a progress bar needs tqdm: pip install 'certiq[progress]', or give a function "
                "as progress"
            ) from None
        tqdm = automatic
    return tqdm(**options)


class Reporter:
    """Hands events on, one at a time."""

    def __init__(self, progress: ProgressLike, name: str) -> None:
        self._lock = Lock()
        self._bar: Any = None
        self._callback: Callback | None = None
        if progress is True:
            self._bar = new_bar(None, total=0, unit="B", unit_scale=True, desc=name or "layer")
        elif callable(progress):
            self._callback = progress
        elif progress:
            raise invalid("progress", f"expected True or a function, got {progress!r}")

    def __call__(self, event: Event) -> None:
        with self._lock:
            if self._callback is not None:
                self._callback(event)
            elif self._bar is not None:
                self._show(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, Upload):
            self._bar.total = event.total_bytes
            self._bar.n = event.bytes
            self._bar.refresh()
        elif isinstance(event, Stage):
            self._bar.set_postfix_str(f"{event.phase} {event.fraction:.0%}")
        else:
            self._bar.set_postfix_str(f"again in {event.delay:.1f} s: {event.error.message}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
