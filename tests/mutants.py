"""Plants one wrong line after another in copies of the package and runs the test that must see it.

    python tests/mutants.py [-n WORKERS] [--only NUMBER|WORD ...]

`mutations.txt` lists them: `file of the package > test`, then the old text, which occurs once in
the file, after `-`, and the new one after `+`. A mutation is killed when pytest reports a failed
test; anything else, such as a test that cannot be collected, leaves it alive. Exit status 1 when
one is alive, or when a test fails without any.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("jaxtrain", "tests", "recipes", "docs", "pyproject.toml", "README.md")
TIMEOUT_S = 600
FAILED = 1  # pytest exits with it when tests fail, and for nothing else


class Mutation(NamedTuple):
    file: str
    """below `jaxtrain/`"""
    test: str
    """file or node id below `tests/`"""
    old: str
    new: str

    def change(self, text: str) -> str:
        """The text of the file with the mutation; ValueError unless the old text occurs once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: {self.old!r} must occur once, found {count} times")
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())} → {' '.join(self.new.split())}"


class Outcome(NamedTuple):
    status: int | None
    """what pytest exits with; None when it took too long"""
    seconds: float
    output: str


def read_mutations(file: Path = ROOT / "tests" / "mutations.txt") -> dict[int, Mutation]:
    """The mutations of a list, by their number from 1."""
    found = []
    for block in file.read_text().strip().split("\n\n"):
        head, *lines = block.splitlines()
        runs = [(sign, "\n".join(line[2:] for line in run))
                for sign, run in groupby(lines, key=lambda line: line[0])]  # fmt: skip
        for (minus, old), (plus, new) in zip(runs[::2], runs[1::2], strict=True):
            assert (minus, plus) == ("-", "+"), head
            found.append(Mutation(*head.split(" > "), old, new))
    return dict(enumerate(found, 1))


@contextmanager
def copy_tree(root: Path) -> Iterator[Path]:
    """A copy of what the tests need, without caches."""
    with tempfile.TemporaryDirectory(prefix="jaxtrain-mutant-") as name:
        folder = Path(name)
        for part in (root / part for part in COPIED if (root / part).exists()):
            if part.is_dir():
                no_caches = shutil.ignore_patterns("__pycache__")
                shutil.copytree(part, folder / part.name, ignore=no_caches)
            else:
                shutil.copy(part, folder)
        yield folder


def run_tests(folder: Path, tests: Iterable[str], *options: str) -> Outcome:
    """Runs tests of a copy up to the first failure."""
    began = time.monotonic()
    command = [
        sys.executable, "-m", "pytest", "-m", "", "-x", "-q", "-p", "no:cacheprovider", *options
    ]  # fmt: skip
    pytest = subprocess.Popen(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = pytest.communicate(timeout=TIMEOUT_S)
        status: int | None = pytest.returncode
    except subprocess.TimeoutExpired:
        os.killpg(pytest.pid, signal.SIGKILL)  # with the processes that the tests have started
        output, status = pytest.communicate()[0], None
    return Outcome(status, time.monotonic() - began, output)


def plant(mutation: Mutation, root: Path) -> Outcome:
    """Runs the test of a mutation in a copy of the tree that has it."""
    with copy_tree(root) as folder:
        file = folder / "jaxtrain" / mutation.file
        file.write_text(mutation.change(file.read_text()))
        return run_tests(folder, [mutation.test])


def run(mutations: Mapping[int, Mutation], root: Path, workers: int) -> int:
    """Plants every mutation, prints what comes of it and returns the exit status."""
    with copy_tree(root) as folder:
        tests = sorted({mutation.test for mutation in mutations.values()})
        plain = run_tests(folder, tests, *(("-n", str(workers)) if workers > 1 else ()))
    print(f"without a mutation: {len(tests)} tests, {plain.seconds:.0f} s", flush=True)
    if plain.status != 0:
        print(f"{plain.output}\nThese tests must pass first; pytest exits with {plain.status}.")
        return 1
    alive = []
    with ThreadPoolExecutor(workers) as pool:
        outcomes = pool.map(plant, mutations.values(), [root] * len(mutations))
        for (number, mutation), outcome in zip(mutations.items(), outcomes, strict=True):
            is_killed = outcome.status == FAILED
            what = "killed" if is_killed else "ALIVE "
            print(f"{number:3} {what} {outcome.seconds:4.0f} s  {mutation}", flush=True)
            if not is_killed:
                last = "".join(outcome.output.strip().splitlines()[-1:])
                alive.append(f"{number:3} {mutation.test}: exits with {outcome.status}, {last}")
    print(*alive, f"{len(mutations) - len(alive)} of {len(mutations)} killed", sep="\n")
    return 1 if alive else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=1, metavar="WORKERS", help="runs at a time")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NUMBER|WORD", help="some of the mutations"
    )
    given = parser.parse_args()
    chosen = {
        number: mutation
        for number, mutation in read_mutations().items()
        if not given.only
        or any(int(w) == number if w.isdigit() else w in str(mutation) for w in given.only)
    }
    if not chosen:
        parser.error(f"--only {' '.join(given.only)}: no mutation has it")
    return run(chosen, ROOT, given.n)


if __name__ == "__main__":
    sys.exit(main())
