"""Ctrl-C and SIGTERM: the first asks for a stop, so that work can be saved; the second stops at once."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

OnStop = Callable[[str], None]


class StopSignals:
    """As a context: the first stop signal is noted in `asked` and passed to `on_stop` by its name; then the earlier
    handlers are back, so that a second one acts at once. Without `second_acts` later ones are noted and passed on too:
    among a launcher's processes, or in one that must not end while another saves. A file of the name `file` asks for a
    stop too, from a dashboard in another process; it is removed on entering and leaving."""

    def __init__(self, on_stop: OnStop = lambda name: None, *, file: Path | None = None, second_acts: bool = True):
        self.on_stop, self.file, self.second_acts = on_stop, file, second_acts
        self.signal: str | None = None  # its name
        self.earlier: dict[int, Any] = {}  # handlers by signal

    @property
    def asked(self) -> str | None:
        """Who asked for a stop, if anybody did."""
        return self.signal or ("the stop button" if self.file and self.file.exists() else None)

    def __enter__(self) -> "StopSignals":
        if self.file:
            self.file.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self.earlier = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number: int, frame: Any) -> None:
        if self.second_acts:
            self.restore()
        self.signal = signal.Signals(number).name
        self.on_stop(self.signal)

    def restore(self) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: Any) -> None:
        self.restore()
        if self.file:
            self.file.unlink(missing_ok=True)
