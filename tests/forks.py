"""The program, in forks of a process that has imported it: that is half of what a small run takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.runs import environment

SERVER = """
import json, os, signal, sys, time
import matplotlib.pyplot  # of the loss
from jaxtrain import SFTTrainer
from jaxtrain.cli import main

for line in sys.stdin:
    arguments, out, err, before, kill_after_s = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        exec(before)
        sys.argv = ["jaxtrain", *arguments]
        main()
        sys.exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)  # nobody else has its number before the next line
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    returncode: int
    """that of the program, or less than 0 for the signal that ended it"""
    stdout: str
    stderr: str


class Forks:
    """One process after another, with these variables in its environment."""

    def __init__(self, folder: Path, **variables: str):
        """`folder` takes what they print."""
        self.files = [str(folder / name) for name in ("stdout", "stderr")]
        variables["PYTHONPATH"] = str(Path(__file__).parents[1])
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        own = environment() | variables
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=own, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: object, before: str = "", kill_after_s: float | None = None) -> Done:
        """Runs the code `before` and then the program, which may be killed after a while."""
        assert self._server.stdin is not None and self._server.stdout is not None
        order = [[str(a) for a in arguments], *self.files, before, kill_after_s]
        self._server.stdin.write(f"{json.dumps(order)}\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Done(code, *(Path(file).read_text() for file in self.files))

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
