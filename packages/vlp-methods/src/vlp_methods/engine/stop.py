"""Has someone asked this process to stop? Imports no torch, so that it can listen before torch is loaded."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol, Self

from vlp_methods.engine.launch import PARENT, STOPPED

PATIENCE = 10.0
"""Seconds that an interrupted evaluation gets to leave by itself: it may wait for the device, or for another
rank that has left already. Then the process ends; its checkpoint was written before."""


class StopNow(BaseException):
    """A stop request during something that may be left at any point. No `Exception`, so that code which
    catches those does not swallow it."""


class Board(Protocol):
    """Where ranks leave notes for each other; a store of `torch.distributed`."""

    def set(self, key: str, value: str) -> Any: ...

    def check(self, keys: list[str]) -> bool: ...


class StopSignals:
    """SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop at the next step boundary; a second Ctrl-C ends at
    once.

    A rank started by `vlp-train --nproc` also stops when that process is gone.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.before: dict[int, Any] = {}
        self.parent = int(os.environ[PARENT]) if PARENT in os.environ else None
        self.now = False
        """Whether a request is obeyed at once."""

    @property
    def requested(self) -> bool:
        if self.parent is not None and os.getppid() != self.parent and self.name is None:
            self.name = "end of the launching process"
        return self.name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        first = self.name is None
        self.name = self.name or signal.Signals(number).name
        if number == signal.SIGINT:
            self.name = "SIGINT"
            if first:
                _say(self.now)
        if self.now:
            self.now = False
            raise StopNow

    @contextlib.contextmanager
    def at_once(self, board: Board | None = None, topic: str = "") -> Iterator[None]:
        """While open, a request on any rank raises `StopNow` on all of them; `board` carries it between them
        under the name `topic`."""
        topic = f"stop/{topic}"
        left = threading.Event()
        watch = threading.Thread(target=self._watch, args=(left, board, topic), daemon=True)
        watch.start()
        try:
            if self.requested:
                raise StopNow
            self.now = True
            yield
        except StopNow:
            if board is not None:
                board.set(topic, "1")
            raise
        except Exception as error:
            # The others may have left in the middle of an exchange with this rank.
            if self.requested or (board is not None and board.check([topic])):
                raise StopNow from error
            raise
        finally:
            self.now = False
            left.set()
            watch.join()

    def _watch(self, left: threading.Event, board: Board | None, topic: str) -> None:
        while not left.wait(0.1):
            if self.requested:
                if board is not None:
                    board.set(topic, "1")
            elif board is None or not board.check([topic]):
                continue
            if self.now:  # nobody has told the main thread yet
                os.kill(os.getpid(), signal.SIGTERM)
            if not left.wait(PATIENCE):
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(STOPPED)
            return

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _say(now: bool) -> None:
    """What Ctrl-C does; by the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        when = "leaving the evaluation" if now else "stopping after this step, with a checkpoint"
        # Not print: a signal may come while something else is being printed.
        os.write(
            2,
            f"\nvlp-train: Ctrl-C: {when}; the same command continues. Once more ends at once, and loses "
            "what came after the newest checkpoint.\n".encode(),
        )
