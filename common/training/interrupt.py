"""Stopping a run on request: SIGTERM (a scheduler's notice) and SIGINT (Ctrl-C) end it after the step in progress."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class RunInterrupted(SystemExit):
    """The run was asked to stop and has written a checkpoint; the process exits with 128 + signal number."""


class StopRequest:
    """While this context is open, the first SIGTERM or SIGINT is remembered in `signal_number` and ends nothing.

    Repetitions change nothing, because launchers forward signals that a terminal has sent already. Python delivers
    signals to the main thread only; in another thread this does nothing.
    """

    signal_number: int = 0

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.signal_number:
            name = signal.Signals(number).name
            print(f"\n{name}: stopping after this step, with a checkpoint", file=sys.stderr, flush=True)
        self.signal_number = self.signal_number or number


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the process as Ctrl-C does, by an exception, so that `finally` still runs; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
