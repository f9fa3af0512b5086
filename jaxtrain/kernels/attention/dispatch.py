"""Chooses the attention implementation for a platform."""

from typing import Literal, NamedTuple

from jaxtrain.kernels.attention.splash import LANES, splash_fault

Wanted = Literal["auto", "pallas", "reference"]


class Choice(NamedTuple):
    name: str
    """the `implementation` to pass to `attention`"""
    reason: str
    """one sentence for the log"""


def choose(platform: str, *, wanted: Wanted, head_size: int, tokens: int) -> Choice:
    """Chooses for sequences of `tokens`; ValueError if the wanted implementation cannot run."""
    if wanted == "reference":
        return Choice("reference", "attention: plain jnp, as set in the recipe")
    fault = _pallas_fault(platform, head_size)
    if wanted == "auto" and fault is None and tokens < LANES:
        fault = f"sequences of {tokens} tokens are shorter than the {LANES} that splash needs"
    if fault is None:
        return Choice("splash", "attention: splash, the Pallas kernel for TPU")
    if wanted == "pallas":
        raise ValueError(f"attention 'pallas' cannot run: {fault}; use 'auto' or 'reference'")
    return Choice("reference", f"attention: plain jnp in blocks of queries, since {fault}")


def _pallas_fault(platform: str, head_size: int) -> str | None:
    if platform == "tpu":
        return splash_fault(head_size=head_size)
    if platform in ("gpu", "cuda", "rocm"):
        return "there is no kernel for packed sequences on GPU yet"
    return f"there is no Pallas kernel for platform {platform!r}"
