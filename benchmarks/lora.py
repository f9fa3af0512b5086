"""Compares a LoRA step of jaxtrain and of peft with transformers and torch, in turn on one machine.

    python benchmarks/lora.py                        SmolLM2-135M shape, 2 x 512, float32, CPU
    python benchmarks/lora.py --preset llama-1.2b    1.2B Llama shape, 4 x 4096, bfloat16, GPU

The same as `cpu_step.py`, with adapters of rank 16 beside every linear layer and all other weights
frozen: only adapters have gradients and moments.
"""

from cpu_step import main

PEFT = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

if __name__ == "__main__":
    main(__doc__, PEFT)
