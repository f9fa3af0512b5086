"""Writes constraints.txt: the newest of everything that pyproject.toml allows, for each Python.

    python3 .ci/constraints.py python3.11 python3.12

Run it from the root of the repository, then the tests with each Python.
"""

import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

REQUIREMENTS = ("-e", ".[dev]", "torch==2.13.0")
LEFT_OUT = ("jaxtrain", "nvidia-", "cuda-", "triton")  # what torch's CUDA builds bring along
HEAD = """\
# The newest versions for Python {pythons}, on Linux, {today}; the tests pass with them.
# To renew: python3 .ci/constraints.py {commands}, then the tests with each Python.
"""


def newest(python: str) -> dict[str, str]:
    """Version of every package that a new environment of this Python would get."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = (f"{folder}/bin/python", "-m", "pip", "install", "--quiet")
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        report = Path(folder, "report.json")
        plan = ("--dry-run", "--ignore-installed", "--report", str(report))
        subprocess.run([*pip, *plan, *REQUIREMENTS], check=True)
        packages = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    return {
        each["name"].lower().replace("_", "-"): each["version"].split("+")[0]
        for each in packages
        if not each["name"].startswith(LEFT_OUT)
    }


def main(commands: list[str]) -> None:
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    pythons = [subprocess.check_output([each, "-c", ask], text=True).strip() for each in commands]
    versions = [newest(command) for command in commands]
    lines = []
    for name in sorted({name for each in versions for name in each}):
        found = [each.get(name) for each in versions]
        if len(set(found)) == 1:
            lines.append(f"{name}=={found[0]}")
            continue
        for python, version in zip(pythons, found, strict=True):
            # The last Python speaks for those that are still to come.
            compare = ">=" if python == pythons[-1] else "=="
            if version:
                lines.append(f"{name}=={version}; python_version {compare} '{python}'")
    head = HEAD.format(
        pythons=" and ".join(pythons), today=date.today(), commands=" ".join(commands)
    )
    Path("constraints.txt").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
