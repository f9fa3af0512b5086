"""The README's first command, on the real model and the real conversations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network]


def test_the_quick_start_learns_and_its_export_is_the_model(tmp_path):
    pytest.importorskip("torch")
    program = str(Path(__file__).with_name("quickstart_run.py"))
    done = subprocess.run(
        [sys.executable, program, str(tmp_path)],
        env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    before, after = found["losses"]
    assert after < 0.95 * before
    assert found["logits_difference"] < 1e-3
    assert len(found["answers"]) == 2 and found["answers"][0] != found["answers"][1]
