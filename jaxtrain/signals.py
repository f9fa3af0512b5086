"""The signals that end a run, and what they do before and after it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jaxtrain.recipe.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)


class Interrupted(BaseException):
    """Unwinds what a signal ends; code that catches every Exception does not stop it."""


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Calls `handler` for the signals that end a run; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # One that is ignored, as SIGINT is in the background jobs of a script, stays ignored.
    numbers = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A signal ends at once what is inside, which has nothing to save: PreemptedError, whatever
    was made of the interruption."""
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise Interrupted

    try:
        with handle_signals(end):
            yield
    except BaseException:
        if not came:
            raise
    if came:
        name = signal.Signals(came[-1]).name
        raise PreemptedError(f"{name}: ended before the first step; run it again")


@contextmanager
def spare_children() -> Iterator[None]:
    """What a terminal sends to all its processes does not reach those that start inside, which
    would each show a traceback; to this one it comes a little later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """For what is left when everything is saved: to say how it ended."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
