"""What asks from outside that a run ends: a file, or a signal."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from jaxtrain.checkpoint import CheckpointEngine
from jaxtrain.recipe.errors import AbortedError, PreemptedError, RecipeError, UserError
from jaxtrain.signals import handle_signals


class StopRequests:
    """Noted when they come, and looked at once per step, so that the step is finished first."""

    def __init__(self, file: Path):
        self.file = file
        self.signal: signal.Signals | None = None
        """the newest that came"""
        self.lost_folder = ""
        """why this process may no longer write, if another one took its folder"""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are noted instead of ending the process. A second SIGINT is a
        KeyboardInterrupt."""
        try:
            with handle_signals(self._note):
                yield
        finally:
            self.signal = None  # an evaluation from here on is not in anyone's way

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # A print could meet another one half done; a write to the descriptor cannot.
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        clear = "\r\x1b[2K" if os.isatty(2) else "\n"  # the live line, which is drawn again
        os.write(2, f"{clear}{self.signal.name}: ending after this step{again}\n".encode())

    def poll(self) -> str | None:
        """Why the run is to end, None while nothing asks; a stop file that is obeyed is removed."""
        if self.signal is not None:
            return self.signal.name
        if self.file.is_file():
            self.file.unlink(missing_ok=True)
            return f"the stop file {self.file}"
        return None

    def note_lost_folder(self, reason: str) -> None:
        self.lost_folder = reason

    def clear_file(self) -> None:
        """Remove the stop file of a run that ended before it was seen; RecipeError for a folder."""
        if self.file.is_dir():
            raise RecipeError(f"kill_switch_path: {self.file} is a folder; remove it")
        self.file.unlink(missing_ok=True)


def preemption_error(name: str, step: int, engines: Iterable[CheckpointEngine]) -> UserError:
    """What a run raises that the signal of this name has ended after so many steps: PreemptedError
    if it can be resumed."""
    saving = [engine for engine in engines if engine.is_full_state and engine.config.enabled]
    when = f"{name}: ended after step {step}"
    if not saving:
        return AbortedError(f"{when}; nothing could be saved: the recipe has no `orbax` entry")
    resumes = any(engine.config.auto_resume for engine in saving)
    how = "" if resumes else "with `auto_resume: true` on its `orbax` entry, "
    if step == 0:
        return PreemptedError(f"{name}: ended before the first step; {how}run it again")
    return PreemptedError(f"{when}, its full state is saved; {how}run it again to continue")
