"""The program, in forks of a process that has imported it: that is half of what a small run takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.runs import environment

SERVER = """
import json, os, signal, sys
from jaxtrain import SFTTrainer
from jaxtrain.cli import main

for line in sys.stdin:
    arguments, out, err, before = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        exec(before)
        sys.argv = ["jaxtrain", *arguments]
        main()
        sys.exit(0)
    print(child, flush=True)
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
        own = environment(PYTHONPATH=str(Path(__file__).parents[1]), **variables)
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=own, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, *arguments: object, before: str = "") -> int:
        """Starts a process that runs the code `before` and then the program; returns its number."""
        order = json.dumps([[str(a) for a in arguments], *self.files, before])
        self.server.stdin.write(f"{order}\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> Done:
        """Returns what became of the process that was started last."""
        code = int(self.server.stdout.readline())
        return Done(code, *(Path(file).read_text() for file in self.files))

    def run(self, *arguments: object, before: str = "") -> Done:
        self.start(*arguments, before=before)
        return self.wait()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
