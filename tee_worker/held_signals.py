"""Ending in peace: a signal that comes while a run gives back what it has made waits until that is done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_HELD = (signal.SIGTERM, signal.SIGINT)


class HeldSignals:
    """A block around all that is to be given back; from :meth:`hold` until its end SIGTERM and SIGINT wait.

    Their handlers raise, and would so leave half of it behind. Does nothing outside of the main thread, where no handler runs.
    """

    def __init__(self) -> None:
        self._own: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in _HELD}
        self._handlers: dict[signal.Signals, Any] = {}
        self._came: list[int] = []

    def take_back(self) -> None:
        """Have the handlers that were there when this was made again: for after a library has put its own in their place."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._own.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def hold(self) -> None:
        """From here on they wait."""
        if threading.current_thread() is threading.main_thread():
            for number in _HELD:
                self._handlers.setdefault(number, signal.signal(number, self._note))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)

    def __enter__(self) -> HeldSignals:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Give the signals back, with the one that came, unless the block ends by an exception anyway."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if self._came and kind is None:
            signal.raise_signal(self._came[0])
