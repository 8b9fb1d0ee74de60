"""Hooks that a Ctrl-C cannot leave behind.

Python raises KeyboardInterrupt between any two steps of a program, also between putting a hook on a module and keeping the handle
that takes it off again. Whoever goes in or out here is not interrupted: Ctrl-C waits until the step is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Protocol


class Removable(Protocol):
    """What can be taken off again, however often it is asked."""

    def remove(self) -> None:
        """Take it off."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    with ExitStack() as stack:
        old = signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
        # Last in, first out: the old answer is back before it is given, also where the block raises.
        stack.callback(lambda: old(*waiting[0]) if waiting and callable(old) else None)
        stack.callback(signal.signal, signal.SIGINT, old)
        yield


@contextmanager
def hooked(handles: Iterable[Removable]) -> Iterator[None]:
    """With some hooks on. Give a generator, such as `(ffn.watch(keep) for ffn in ffns)`: the hooks are put on as it is drawn,
    and all of them are off again after the block, also if one could not be put on."""
    kept: list[Removable] = []

    def remove() -> None:
        with uninterrupted():
            for handle in kept:
                handle.remove()

    try:
        try:
            with uninterrupted():
                for handle in handles:
                    kept.append(handle)
            yield
        finally:
            remove()
    finally:  # once more: Ctrl-C may have come just before it could be held back
        remove()
