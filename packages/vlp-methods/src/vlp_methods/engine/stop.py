"""Has someone asked this process to stop? Imports no torch, so that it can listen before torch is loaded."""

import os
import signal
from types import FrameType
from typing import Any, Self

from vlp_methods.engine.launch import PARENT


class StopSignals:
    """SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop at the next step boundary; a second Ctrl-C ends at
    once.

    A rank started by `vlp-train --nproc` also stops when that process is gone.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.before: dict[int, Any] = {}
        self.parent = int(os.environ[PARENT]) if PARENT in os.environ else None

    @property
    def requested(self) -> bool:
        if self.parent is not None and os.getppid() != self.parent and self.name is None:
            self.name = "end of the launching process"
        return self.name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
