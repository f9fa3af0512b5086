"""`python -m benchmarks` runs every comparison that this machine supports, in turn."""

import subprocess
import sys
from pathlib import Path

import jax

here = Path(__file__).parent
has_gpu = any(device.platform == "gpu" for device in jax.devices())
preset = "llama-1.2b" if has_gpu else "smollm2-135m"
commands = [[name, "--preset", preset] for name in ("cpu_step.py", "lora.py")]
for command in commands:
    print(f"== {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, str(here / command[0]), *command[1:]], check=True)
