"""What an update costs is counted from the model and the batch, as the formula says. Trap G4."""

import re

import numpy as np
import pytest

from jaxtrain.batch import Batch
from jaxtrain.metrics.flops import count_matmul_parameters, count_tokens, find_peak_flops
from tests.model.tiny_models import FAMILIES, describe_model, hf_model, save_model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_is_multiplied_with_the_matrices_of_its_family(tmp_path, name):
    """Those of the torch model: all but an embedding that is only looked up, and of experts those
    that a token takes."""
    theirs = hf_model(name)
    config = theirs.config
    experts = getattr(config, "num_experts", getattr(config, "n_routed_experts", None))
    share = 1
    if experts:
        taken = getattr(config, "num_experts_per_tok", None) or config.top_k_experts
        share = taken / experts
    sizes = {
        n: p.numel() * (share if ".experts." in n else 1) for n, p in theirs.named_parameters()
    }
    matrices = {n: sizes[n] for n, p in theirs.named_parameters() if p.ndim in (2, 3)}
    looked_up = r".*wpe.*|.*(vision|visual|multi_modal|per_layer\.).*|.*_bias"
    if "lm_head.weight" in matrices:
        looked_up += r"|.*(embed_tokens|embed_in).*"
    matrices = {n: size for n, size in matrices.items() if not re.fullmatch(looked_up, n)}
    _, _, model = describe_model(save_model(name, tmp_path))
    found = count_matmul_parameters(model.shapes, share_of_experts=share)
    assert found == pytest.approx(sum(matrices.values()))


def test_pairs_are_what_the_rows_let_each_token_see():
    """Documents of 3 and 2 tokens, then padding; a filler row. Layers without and with a window, and
    with heads of twice the size."""
    segments = np.array([[[1, 1, 1, 2, 2, 0]], [[0] * 6]])
    positions = np.array([[[0, 1, 2, 0, 1, 0]], [[0] * 6]])
    weights = np.array([[[0.0, 1, 1, 0, 1, 0]], [[0.0] * 6]])
    batch = Batch(segments, positions, segments, weights, np.zeros((2, 1)))
    layers = ((None, 1.0), (None, 1.0), (2, 1.0), (None, 2.0))
    found = {name: float(value) for name, value in count_tokens(batch, layers).items()}
    whole, windowed = 6 + 3, (1 + 2 + 2) + 3
    pairs = 2 * whole + windowed + 2 * whole
    assert found == {
        "rows": 1, "seqlen": 6, "tokens": 5, "trained_tokens": 3, "pairs": pairs
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H100 PCIe", 756e12), ("cpu", None)],
)
def test_a_kind_of_device_has_the_peak_of_its_longest_name(kind, peak):
    assert find_peak_flops(kind) == peak
