"""`python -m benchmarks` runs every comparison that this machine supports, in turn."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax

here = Path(__file__).parent
has_gpu = any(device.platform == "gpu" for device in jax.devices())
preset = "llama-1.2b" if has_gpu else "smollm2-135m"
commands = [[name, "--preset", preset] for name in ("cpu_step.py", "lora.py")]
if not has_gpu and find_spec("trl") is not None:
    commands.append(["cpu_sft.py"])
for command in commands:
    print(f"== {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, str(here / command[0]), *command[1:]], check=True)
