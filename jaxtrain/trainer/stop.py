"""What asks from outside that a run ends: a file, or a signal."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from jaxtrain.recipe.errors import AbortedError, PreemptedError, UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequests:
    """Noted when they come, and looked at once per step, so that the step is finished first."""

    def __init__(self, file: Path):
        self.file = file
        self.signal: signal.Signals | None = None
        """the newest that came"""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are noted instead of ending the process; outside the main thread nothing
        changes. A second SIGINT is a KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # One that is ignored, as SIGINT is in the background jobs of a script, stays ignored.
        numbers = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            self.signal = None  # an evaluation from here on is not in anyone's way
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # A print could meet another one half done; a write to the descriptor cannot.
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        os.write(2, f"\n{self.signal.name}: ending after this step{again}\n".encode())

    def poll(self) -> str | None:
        """Why the run is to end, None while nothing asks; a stop file that is obeyed is removed."""
        if self.signal is not None:
            return self.signal.name
        if self.file.exists():
            self.file.unlink(missing_ok=True)
            return f"the stop file {self.file}"
        return None


def preemption_error(name: str, step: int, *, has_full_state: bool, resumes: bool) -> UserError:
    """What a run raises that the signal of this name has ended after so many steps: PreemptedError
    if it can be resumed."""
    when = f"{name}: ended after step {step}"
    if not has_full_state:
        return AbortedError(f"{when}; nothing could be saved: the recipe has no `orbax` entry")
    how = "" if resumes else "with `auto_resume: true` on its `orbax` entry, "
    if step == 0:
        return PreemptedError(f"{name}: ended before the first step; {how}run it again")
    return PreemptedError(f"{when}, its full state is saved; {how}run it again to continue")
