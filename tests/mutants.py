"""Plants one wrong line after another in copies of the package and runs the tests that must see it.

    python tests/mutants.py [-n WORKERS] [--only NUMBER|WORD ...]

A mutation is killed when pytest reports failed tests; anything else, such as tests that cannot be
collected, leaves it alive. Exit status 1 when any is alive, or when a test fails without one.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("jaxtrain", "tests", "recipes", "docs", "pyproject.toml", "README.md")
TIMEOUT_S = 600
FAILED = 1  # what pytest exits with when tests fail, and for nothing else


class Mutation(NamedTuple):
    file: str
    """of the package"""
    old: str
    """occurs once in the file"""
    new: str
    test: str
    """file, or node id, below `tests/`"""

    def apply(self, root: Path) -> None:
        """Changes the file of a tree; ValueError unless the old text occurs once."""
        file = root / "jaxtrain" / self.file
        text = file.read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: {self.old!r} must occur once, found {count} times")
        file.write_text(text.replace(self.old, self.new))

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())} → {' '.join(self.new.split())}"


class Outcome(NamedTuple):
    status: int | None
    """what pytest exits with; None when it took too long"""
    seconds: float
    output: str

    @property
    def is_killed(self) -> bool:
        return self.status == FAILED


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
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options]
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
        mutation.apply(folder)
        return run_tests(folder, [mutation.test])


def select(words: Sequence[str]) -> dict[int, Mutation]:
    """The mutations, by their number from 1, that have one of these numbers or words."""
    return {
        number: mutation
        for number, mutation in enumerate(MUTATIONS, 1)
        if not words or any(w == str(number) or w in "\n".join(mutation) for w in words)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=1, metavar="WORKERS", help="runs at a time")
    parser.add_argument("--only", nargs="+", default=(), metavar="NUMBER|WORD")
    given = parser.parse_args()
    chosen = select(given.only)
    with copy_tree(ROOT) as folder:
        tests = sorted({mutation.test for mutation in chosen.values()})
        plain = run_tests(folder, tests, *(("-n", str(given.n)) if given.n > 1 else ()))
    print(f"without a mutation: {len(tests)} tests, {plain.seconds:.0f} s", flush=True)
    if plain.status != 0:
        print(f"{plain.output}\nThese tests must pass first; pytest exited with {plain.status}.")
        return 1
    alive = []
    with ThreadPoolExecutor(given.n) as pool:
        outcomes = pool.map(plant, chosen.values(), [ROOT] * len(chosen))
        for (number, mutation), outcome in zip(chosen.items(), outcomes, strict=True):
            what = "killed" if outcome.is_killed else "ALIVE "
            print(f"{number:3} {what} {outcome.seconds:4.0f} s  {mutation}", flush=True)
            if not outcome.is_killed:
                last = outcome.output.strip().splitlines()[-1:]
                alive.append(f"{number:3} {mutation.test}: exit {outcome.status}: {last}")
    print(*alive, f"{len(chosen) - len(alive)} of {len(chosen)} killed", sep="\n")
    return 1 if alive else 0


LOGITS = "model/test_families.py::test_logits_equal_those_of_transformers"
REFERENCE = "optimizer/test_references.py::test_an_optimizer_equals_its_reference_on_each_matrix"
ATTENTION = "kernels/test_attention.py"
CROSS_ENTROPY = (
    "kernels/test_cross_entropy.py::test_value_and_gradients_equal_the_definition[DV-sum-options3]"
)
A38 = "data/test_order.py::test_a38_packed_documents_are_apart"
MASKS = "data/test_masks.py::test_a1_exactly_the_assistant_is_trained"
RATES = "scheduler/test_schedules.py::test_the_rate_of_every_update"
STEP = "trainer/test_step.py"
RESUMED = "trainer/test_resume.py::test_a_resumed_run_is_bitwise_the_unbroken_one[6]"
LOST = "trainer/test_nothing_lost.py"
GUARDS = "trainer/test_guards.py"
DUE = "trainer/test_progress.py::test_an_evaluation_is_due_once_where_the_recipe_says"
RETENTION = "checkpoint/test_retention.py"
ZERO = "trainer/test_zero.py::test_a_stage_changes_no_loss_and_holds_what_it_says"
MESH = "trainer/test_mesh.py::test_a_mesh_changes_no_number"

# By the file that they change; the test is the one that says most plainly what is wrong.
MUTATIONS = tuple(
    Mutation(file, *rest)
    for file, mutations in {
        "trainer/step.py": [
            (
                "clip = jnp.minimum(1.0, spec.max_grad_norm / norm) if spec.max_grad_norm else 1.0",
                "clip = 1.0",
                f"{STEP}::test_an_update_is_of_the_mean_gradient_clipped_to_the_norm",
            ),
            (
                "jnp.minimum(1.0, spec.max_grad_norm / norm)",
                "jnp.minimum(1.0, spec.max_grad_norm / norm * per_weight)",
                f"{STEP}::test_an_update_is_of_the_mean_gradient_clipped_to_the_norm",
            ),
            (
                "jnp.minimum(1.0, spec.max_grad_norm / norm)",
                "spec.max_grad_norm / norm",
                f"{STEP}::test_an_update_is_of_the_mean_gradient_clipped_to_the_norm",
            ),
            (
                "lr_scale = spec.schedule(state.step)",
                "lr_scale = spec.schedule(state.step + 1)",
                f"{STEP}::test_an_update_is_of_the_mean_gradient_clipped_to_the_norm",
            ),
            (
                "norm = optax.tree.norm(gradients) * per_weight",
                "norm = optax.tree.norm(gradients)",
                f"{STEP}::test_the_norm_is_of_the_mean_gradient_and_before_clipping",
            ),
            (
                "per_weight = 1 / jnp.maximum(loss.weight,",
                "per_weight = 1 / jnp.maximum(batch.tokens.size,",
                f"{STEP}::test_the_norm_is_of_the_mean_gradient_and_before_clipping",
            ),
            (
                "key = jax.random.fold_in(jax.random.key(spec.seed), state.step)",
                "key = jax.random.key(spec.seed)",
                f"{STEP}::test_every_microbatch_of_every_step_has_a_key_of_its_own",
            ),
            (
                "jax.random.fold_in(jax.random.key(spec.seed), state.step)",
                "jax.random.fold_in(jax.random.key(0), state.step)",
                f"{STEP}::test_every_microbatch_of_every_step_has_a_key_of_its_own",
            ),
            (
                "keys = jax.random.split(key, num_microbatches)",
                "keys = jnp.stack([key] * num_microbatches)",
                f"{STEP}::test_every_microbatch_of_every_step_has_a_key_of_its_own",
            ),
            (
                "gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)",
                "gradients = jax.tree.map(lambda g: g, gradients)",
                f"{STEP}::test_gradients_of_weights_in_bfloat16_are_summed_in_float32",
            ),
            (
                "return jax.lax.scan(body, zeros, (batch, keys))[0]",
                "return jax.tree.map(lambda a: a / num_microbatches, "
                "jax.lax.scan(body, zeros, (batch, keys))[0])",
                f"{STEP}::test_accumulation_equals_one_larger_batch",
            ),
            (
                "finite = jnp.isfinite(loss.total) & jnp.isfinite(norm)",
                "finite = jnp.isfinite(loss.total)",
                f"{STEP}::test_what_is_not_finite_leaves_the_state",
            ),
            (
                "finite = jnp.isfinite(loss.total) & jnp.isfinite(norm)",
                "finite = jnp.isfinite(norm)",
                f"{STEP}::test_what_is_not_finite_leaves_the_state",
            ),
            (
                "apply_if(finite & (loss.weight > 0), update",
                "apply_if(finite, update",
                f"{STEP}::test_a_batch_without_trained_tokens_changes_nothing_but_the_count",
            ),
            (
                "step=state.step, is_training=False",
                "step=state.step, is_training=True",
                "trainer/test_loss.py::test_smoothing_is_trained_and_not_evaluated",
            ),
        ],
        "trainer/loss.py": [
            (
                "perplexity = math.exp(",
                "perplexity = 2 ** (",
                "trainer/test_loss.py::test_an_evaluation_is_over_all_tokens_of_a_set",
            ),
            (
                "return weights_T / jnp.where(sums > 0, sums, 1)[segments_T]",
                "return weights_T / jnp.where(sums > 0, sums, 1).max()",
                "trainer/test_loss.py::test_by_sample_each_document_counts_once",
            ),
        ],
        "trainer/evaluation.py": [
            (
                "sums[name] = reduce(add_losses, losses)",
                "sums[name] = losses[-1]",
                "trainer/test_loss.py::test_an_evaluation_is_over_all_tokens_of_a_set",
            ),
        ],
        "trainer/sft.py": [
            (
                "total=nll.total - nll.z_total",
                "total=nll.total",
                "trainer/test_loss.py::test_z_loss_is_trained_and_told_apart",
            ),
        ],
        "trainer/average.py": [
            (
                "share = step >= self.config.start_step, 1 - self.config.decay",
                "share = step >= self.config.start_step, self.config.decay",
                "trainer/test_average.py::test_it_is_the_exponential_average_from_its_start_on",
            ),
            (
                "step >= self.config.start_step",
                "step > self.config.start_step",
                "trainer/test_average.py::test_it_is_the_exponential_average_from_its_start_on",
            ),
            (
                "return state.average if self.config and self.config.eval else state.params",
                "return state.params",
                "trainer/test_average.py::test_it_is_evaluated_and_exported",
            ),
        ],
        "trainer/progress.py": [
            (
                "return at_end or bool((by_step or by_epoch) and self.step >= "
                "config.eval_after_step)",
                "return at_end or bool(by_step or by_epoch)",
                DUE,
            ),
            (
                "self.step >= config.eval_after_step",
                "self.step > config.eval_after_step",
                DUE,
            ),
            (
                'self.position = 0 if "data" in reset else saved.get("position", self.step)',
                'self.position = 0 if "data" in reset else self.step',
                f"{GUARDS}::test_skip_drops_the_update_and_consumes_the_batch",
            ),
            (
                "return min(limits)",
                "return max(limits)",
                "trainer/test_progress.py::test_the_last_step_is_the_first_limit_and_ends_the_run",
            ),
        ],
        "trainer/guards.py": [
            (
                'metric_direction(config.metric, config.mode) == "max"',
                'metric_direction(config.metric, config.mode) == "min"',
                f"{GUARDS}::test_early_stopping_counts_evaluations_without_a_better_value",
            ),
            (
                "if self.stale >= self.config.patience:",
                "if self.stale > self.config.patience:",
                f"{GUARDS}::test_early_stopping_counts_evaluations_without_a_better_value",
            ),
            (
                "self.in_a_row = 0 if is_finite else self.in_a_row + 1",
                "self.in_a_row = self.in_a_row + (not is_finite)",
                f"{GUARDS}::test_ten_skips_in_a_row_are_too_many",
            ),
            (
                "short += config.short_alpha * (value - short)",
                "short += config.long_alpha * (value - short)",
                f"{GUARDS}::test_divergence_tells_a_rise_from_a_spike",
            ),
        ],
        "trainer/trainer.py": [
            (
                "progress.position = position\n",
                "pass\n",
                f"{GUARDS}::test_rollback_restores_and_goes_on_behind_the_offending_batches",
            ),
            (
                "if due and not is_finite(self.state):",
                "if False:",
                f"{LOST}::test_weights_that_a_finite_loss_made_infinite_are_not_saved",
            ),
            (
                "self.data.train_batches(self.progress.position, end)",
                "self.data.train_batches(self.progress.position + 1, end)",
                RESUMED,
            ),
        ],
        "trainer/interface.py": [
            (
                '{"data.digest": self.data.train.digest}',
                '{"data.digest": ""}',
                f"{LOST}::test_other_rows_under_the_same_path_do_not_continue_a_run",
            ),
        ],
        "trainer/checkpoints.py": [
            ('if "optimizer" in reset:', "if True:", RESUMED),
        ],
        "trainer/run.py": [
            (
                "schedule(step - start)) if start else schedule",
                "schedule(step)) if start else schedule",
                "trainer/test_resume.py::test_a_reset_schedule_goes_on_over_further_restarts",
            ),
            (
                "params, frozen = place(shapes, over_data=stage >= 1)",
                "params, frozen = place(shapes, over_data=stage >= 2)",
                ZERO,
            ),
            (
                "grad_shardings=groups.trained(place(over_data=stage >= 2))",
                "grad_shardings=groups.trained(place(over_data=stage >= 3))",
                ZERO,
            ),
            (
                "dtype=self.config.model.dtype or self.model.compute.compute_dtype",
                "dtype=self.model.param_dtype",
                "trainer/test_resume.py::test_an_export_is_written_as_its_entry_says",
            ),
        ],
        "kernels/attention/mask.py": [
            (
                "distance < window",
                "distance <= window",
                f"{LOGITS}[mistral]",
            ),
            (
                "(distance >= 0)",
                "(distance >= -1)",
                f"{ATTENTION}::test_reference_takes_any_length",
            ),
            (
                "(q_segments == kv_segments) & ",
                "",
                f"{ATTENTION}::test_a_packed_row_equals_each_document_alone",
            ),
            ("** -0.5", "** -0.4", f"{LOGITS}[llama2]"),
        ],
        "kernels/attention/reference.py": [
            (
                "x = x_BTNH.reshape(B, blocks, C, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)",
                "x = x_BTNH.reshape(B, blocks, C, N // K, K, H).transpose(1, 0, 4, 3, 2, 5)",
                f"{ATTENTION}::test_heads_share_keys_in_groups",
            ),
            (
                "max(0, first * C - window + 1)",
                "max(0, first * C - window + 2)",
                f"{ATTENTION}::test_long_rows_agree_where_blocks_are_looped_over",
            ),
            (
                "d_scores_BKSR = p_BKSR * (d_p_BKSR - delta_BKR1.swapaxes(2, 3)) * scale",
                "d_scores_BKSR = p_BKSR * d_p_BKSR * scale",
                f"{ATTENTION}::test_reference_takes_any_length",
            ),
        ],
        "kernels/cross_entropy.py": [
            (
                "(1 + 2 * plan.z_loss * lse_IbC1)",
                "(1 + plan.z_loss * lse_IbC1)",
                CROSS_ENTROPY,
            ),
            (
                "smoothing / d_IbCV.shape[-1] * w_IbC1",
                "smoothing * w_IbC1",
                CROSS_ENTROPY,
            ),
            (
                "jnp.where(w_IbC[..., None] != 0, x_IbCD, 0)",
                "x_IbCD",
                "kernels/test_cross_entropy.py::test_a_bad_row_of_weight_0_does_not_leak",
            ),
            (
                "return NLL(*(x.sum() for x in nll)), saved",
                "return NLL(*(x.mean() for x in nll)), saved",
                "kernels/test_cross_entropy.py"
                "::test_the_mesh_changes_nothing_and_the_head_moves_once",
            ),
            (
                "d_head_DV = sums_IDV.sum(0)",
                "d_head_DV = sums_IDV[0]",
                "kernels/test_cross_entropy.py"
                "::test_the_mesh_changes_nothing_and_the_head_moves_once",
            ),
        ],
        "model/decoder.py": [
            (
                "jnp.roll(logps_BT, 1, axis=1), 0.0)",
                "logps_BT, 0.0)",
                "model/test_decoder.py::test_token_log_probs_are_those_of_the_logits",
            ),
            (
                "_next(weights_BT),",
                "weights_BT,",
                "model/test_decoder.py::test_the_weighted_sum_is_that_of_the_log_probs",
            ),
            (
                "weights_BT = jnp.where(_is_predicted(batch.segments), weights_BT, 0.0)",
                "pass",
                "model/test_decoder.py::test_the_weighted_sum_is_that_of_the_log_probs",
            ),
            (
                "rms_norm(x_BTD, self.norm[...], self.config.rms_eps)",
                "rms_norm(x_BTD, self.norm[...], 1e-6)",
                f"{LOGITS}[llama2]",
            ),
            (
                "constrain(y_MBTD.swapaxes(0, 1).reshape(x_BTD.shape)",
                "constrain(y_MBTD.reshape(x_BTD.shape)",
                f"{MESH}[sft-pipeline2 data2 tensor2]",
            ),
        ],
        "model/layers.py": [
            (
                "self.eps = config.rms_eps\n        self.window",
                "self.eps = 1e-6\n        self.window",
                f"{LOGITS}[qwen3]",
            ),
            (
                "self.mlp = GatedMLP(config, compute, init, L)\n        self.eps = config.rms_eps",
                "self.mlp = GatedMLP(config, compute, init, L)\n        self.eps = 1e-6",
                f"{LOGITS}[llama2]",
            ),
            (
                "x32 = x.astype(jnp.float32)",
                "x32 = x",
                "model/test_decoder.py::test_norms_are_computed_in_float32",
            ),
            (
                "jax.nn.silu(wide[..., 0, :]) * wide[..., 1, :]",
                "jax.nn.silu(wide[..., 1, :]) * wide[..., 0, :]",
                f"{LOGITS}[llama2]",
            ),
            (
                "k_BTK1H = rms_norm(k_BTK1H, self.k_norm[...], self.eps)",
                "k_BTK1H = rms_norm(k_BTK1H, self.q_norm[...], self.eps)",
                f"{LOGITS}[qwen3]",
            ),
        ],
        "model/rope.py": [
            ("b * cos + a * sin", "b * cos - a * sin", f"{LOGITS}[llama2]"),
            (
                "jnp.split(x.astype(jnp.float32), 2, axis=-1)",
                "(x.astype(jnp.float32)[..., ::2], x.astype(jnp.float32)[..., 1::2])",
                f"{LOGITS}[llama2]",
            ),
            (
                'fields.get(original), hf.get("max_position_embeddings"))',
                "fields.get(original), 8192)",
                "model/test_source.py"
                "::test_the_original_length_beside_rope_counts_before_the_one_in_it",
            ),
            (
                "(turns_R - low) / (high - low), 0.0, 1.0)",
                "turns_R - low, 0.0, 1.0)",
                f"{LOGITS}[llama31]",
            ),
        ],
        "model/families.py": [
            (
                'window if i >= hf["max_window_layers"] else None',
                'window if i > hf["max_window_layers"] else None',
                "model/test_families.py::test_windows_of_upper_layers_are_those_of_transformers",
            ),
            (
                '"max_window_layers": 28,',
                '"max_window_layers": 0,',
                "model/test_families.py::test_windows_of_upper_layers_are_those_of_transformers",
            ),
            (
                '".self_attn.o_proj.weight: D KGH -> K G H D"',
                '".self_attn.o_proj.weight: D GKH -> K G H D"',
                f"{LOGITS}[llama3]",
            ),
            (
                '".mlp.gate_proj.weight: F D -> D 1 F", ".mlp.up_proj.weight: F D -> D 1 F"',
                '".mlp.up_proj.weight: F D -> D 1 F", ".mlp.gate_proj.weight: F D -> D 1 F"',
                f"{LOGITS}[llama3]",
            ),
        ],
        "model/hf_config.py": [
            (
                "return has_own_head(read_folder(path))",
                "return False",
                "model/test_source.py::test_a_head_of_its_own_in_a_tied_model_counts",
            ),
            (
                "stops = [*listed, *missing]",
                "stops = [*missing]",
                "model/test_source.py::test_the_ends_of_turns_that_were_trained_are_exported",
            ),
        ],
        "model/weights.py": [
            (
                "mean = rows.mean(0, dtype=np.float32).astype(rows.dtype)",
                "mean = rows[0]",
                "trainer/test_vocabulary.py::test_new_rows_are_the_mean_and_the_export_is_whole",
            ),
            (
                "return ours.transpose(np.argsort(self.order)).reshape(self.shape)",
                "return ours.reshape(self.shape)",
                "model/test_families.py::test_export_equals_what_was_loaded_bit_for_bit[llama3]",
            ),
        ],
        "model/factory.py": [
            (
                'config.dtype or ("float32" if on == "cpu" else "bfloat16")',
                'config.dtype or "float32"',
                "model/test_factory.py::test_the_dtype_is_bfloat16_by_default_on_accelerators",
            ),
        ],
        "model/generate.py": [
            (
                ".set(lengths_B + progress.count)",
                ".set(slot)",
                "model/test_generate.py::test_greedy_tokens_equal_those_of_transformers",
            ),
            (
                "logits_BV = logits_BV / sampling.temperature",
                "logits_BV = logits_BV * sampling.temperature",
                "model/test_generate.py::test_sampled_tokens_follow_the_probabilities",
            ),
        ],
        "optimizer/optimizers.py": [
            (
                "optax.scale_by_adam(*optimizer_config.betas, eps",
                "optax.scale_by_adam(*optimizer_config.betas[::-1], eps",
                f"{REFERENCE}[adamw]",
            ),
            (
                "optax.scale_by_lion(*optimizer_config.betas)",
                "optax.scale_by_lion(*optimizer_config.betas[::-1])",
                f"{REFERENCE}[lion]",
            ),
            (
                "return descend(optimizer_config, trace)",
                "return optax.chain(optax.add_decayed_weights(optimizer_config.weight_decay, "
                "decay_mask), trace, optax.scale_by_learning_rate(optimizer_config.learning_rate))",
                f"{REFERENCE}[sgd-momentum]",
            ),
            (
                '.endswith(("norm", "bias"))',
                '.endswith("norm")',
                f"{REFERENCE}[adamw]",
            ),
            (
                '.endswith(("norm", "bias"))',
                '.endswith("bias")',
                f"{REFERENCE}[adamw]",
            ),
        ],
        "optimizer/adafactor.py": [
            ("MAX_RMS = 1.0", "MAX_RMS = 2.0", f"{REFERENCE}[adafactor]"),
            (
                "return update / layout.repeat(jnp.maximum(1.0, rms / MAX_RMS), grad)",
                "return update",
                f"{REFERENCE}[adafactor]",
            ),
            ("DECAY_POWER = -0.8", "DECAY_POWER = -0.7", f"{REFERENCE}[adafactor]"),
        ],
        "optimizer/matrices.py": [
            (
                '"out": Layout((1, 2, 3), (4,))',
                '"out": Layout((1,), (2, 3, 4))',
                f"{REFERENCE}[muon]",
            ),
            (
                '"gate_up": Layout((1,), (3,))',
                '"gate_up": Layout((1,), (2, 3))',
                f"{REFERENCE}[muon]",
            ),
            (
                '"qkv": Layout((1,), (2, 3, 4), joined=3)',
                '"qkv": Layout((1,), (2, 3, 4))',
                f"{REFERENCE}[muon]",
            ),
        ],
        "optimizer/muon.py": [
            (
                "RMS * math.sqrt(max(shape[-2:]))",
                "RMS * math.sqrt(min(shape[-2:]))",
                f"{REFERENCE}[muon]",
            ),
            ("RMS = 0.2", "RMS = 0.25", f"{REFERENCE}[muon]"),
            (
                'HIDDEN = {"qkv", "out", "gate_up", "down"}',
                'HIDDEN = {"qkv", "out", "gate_up", "down", "embedding"}',
                f"{REFERENCE}[muon]",
            ),
            (
                "bias_correction(mu, momentum, count + nesterov)",
                "bias_correction(mu, momentum, count)",
                f"{REFERENCE}[muon-nesterov]",
            ),
        ],
        "optimizer/groups.py": [
            (
                "rate = self.config.learning_rate * group.lr_scale",
                "rate = self.config.learning_rate",
                "optimizer/test_groups.py::test_a_group_is_the_optimizer_with_its_settings[adamw]",
            ),
        ],
        "optimizer/moments.py": [
            (
                "below = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)",
                "below = jnp.uint32(0x8000)",
                "optimizer/test_groups.py::test_moments_in_bfloat16_forget_as_those_in_float32",
            ),
        ],
        "scheduler/schedules.py": [
            (
                "_progress(step, 0, warmup), after(step))",
                "_progress(step + 1, 0, warmup), after(step))",
                f"{RATES}[linear]",
            ),
            (
                "fall(_progress(step, warmup, horizon))",
                "fall(_progress(step, 0, horizon))",
                f"{RATES}[cosine]",
            ),
            (
                "0.5 * (1 + jnp.cos(2 * jnp.pi * num_cycles * x))",
                "0.5 * (1 + jnp.cos(jnp.pi * num_cycles * x))",
                f"{RATES}[cosine_with_min_lr]",
            ),
        ],
        "scheduler/factory.py": [
            (
                'decay_type="cosine"',
                'decay_type="linear"',
                "scheduler/test_schedules.py::test_wsd_decays_by_a_cosine_as_upstream",
            ),
        ],
        "parallel/pipeline.py": [
            (
                "jax.tree.map(lambda a: a[m], inputs)",
                "jax.tree.map(lambda a: a[0], inputs)",
                f"{MESH}[sft-pipeline2 data2 tensor2]",
            ),
        ],
        "parallel/layout.py": [
            (
                "return a[:, first : first + stop - start]",
                "return a[:, : stop - start]",
                f"{MESH}[sft-data8]",
            ),
        ],
        "metrics/flops.py": [
            (
                "jnp.sum(batch.loss_weights > 0, dtype=jnp.int32)",
                "jnp.sum(batch.segments > 0, dtype=jnp.int32)",
                f"{STEP}::test_metrics_count_the_tokens_of_the_batch",
            ),
            (
                "visible if window is None else jnp.minimum(visible, window)",
                "visible",
                "metrics/test_flops.py::test_pairs_are_what_the_rows_let_each_token_see",
            ),
        ],
        "metrics/meter.py": [
            (
                "flops_per_token=6.0 *",
                "flops_per_token=2.0 *",
                "metrics/test_rows.py::test_a_row_has_the_flops_of_the_model",
            ),
            (
                "flops / seconds / self.num_devices / 1e12",
                "flops / seconds / 1e12",
                "metrics/test_rows.py::test_rates_are_over_the_interval_and_per_device",
            ),
        ],
        "metrics/writer.py": [
            (
                "<= resumed_at > 0",
                "< resumed_at",
                f"{LOST}::test_a_broken_line_of_metrics_takes_no_other_with_it",
            ),
        ],
        "data/plan.py": [
            (
                "np.searchsorted(self.lengths, longest)",
                'np.searchsorted(self.lengths, longest, side="right").clip(max=len(self.lengths)'
                " - 1)",
                "data/test_sft.py"
                "::test_an_update_has_the_shortest_of_few_lengths_that_holds_its_rows",
            ),
            ("segments[start:end] = segment", "segments[start:end] = 1", A38),
            (
                "positions[start:end] = np.arange(length)",
                "positions[start:end] = np.arange(start, end)",
                A38,
            ),
            ("loss_weights[start] = 0", "pass", A38),
            (
                "permutation(count, EPOCH, seed, epoch)",
                "permutation(count, EPOCH, seed, 0)",
                "data/test_order.py::test_a8_every_epoch_is_complete_and_in_another_order",
            ),
            (
                "permutation(count, EPOCH, seed, epoch)",
                "permutation(count, EPOCH, 0, epoch)",
                "data/test_order.py::test_other_seeds_have_other_orders",
            ),
            (
                "permutation(size, MIXTURE, seed, first, number)",
                "permutation(size, MIXTURE, seed, first, 0)",
                "data/test_mixtures.py::test_every_epoch_draws_anew",
            ),
            (
                "-(-self.pass_sequences * self.passes // self.shape.step_sequences)",
                "max(1, self.pass_sequences * self.passes // self.shape.step_sequences)",
                "trainer/test_epochs.py::test_accumulation_counts_updates_and_weighs_tokens",
            ),
        ],
        "data/order.py": [
            (
                "exact = np.array(shares) / sum(shares) * total",
                "exact = np.ones(len(shares)) / len(shares) * total",
                "data/test_mixtures.py::test_shares_are_met_and_no_document_is_favoured",
            ),
            (
                "np.unique(digests, return_inverse",
                "np.unique(np.arange(len(digests)), return_inverse",
                "data/test_sft.py::test_the_split_is_disjoint_by_content_and_by_seed",
            ),
        ],
        "data/packing.py": [
            (
                'searchsorted(ends, cuts, side="right")',
                'searchsorted(ends, cuts, side="left")',
                "data/test_mixtures.py::test_slices_are_full_and_hold_every_token_once_in_order",
            ),
            (
                "if length > room:",
                "if length >= room:",
                "data/test_packing.py"
                "::test_next_fit_keeps_the_order_and_opens_a_row_only_when_it_must",
            ),
        ],
        "data/encode.py": [
            ("last = index + 1", "last = index", MASKS),
            (
                "kept = kept[: self.max_length]",
                "kept = kept[-self.max_length :]",
                "data/test_masks.py::test_a47_a_cut_row_is_the_start_of_the_whole_one",
            ),
            (
                "after = [] if ids[-1] == eos else [eos]",
                "after = [eos]",
                "data/test_tokens_and_text.py::test_a_text_has_one_bos_and_one_eos",
            ),
            (
                "is_trained &= _read_mask(record, name, len(tokens))",
                "is_trained = _read_mask(record, name, len(tokens))",
                "data/test_tokens_and_text.py::test_masks_of_tokenised_rows_are_read",
            ),
            (
                "is_trained &= labels != IGNORED",
                "pass",
                "data/test_tokens_and_text.py::test_tokenised_rows_are_taken_as_they_stand",
            ),
        ],
        "data/render.py": [
            (
                'if message.get("weight", 1) and says_something(message)',
                "if says_something(message)",
                "data/test_masks.py::test_a_turn_of_weight_0_is_not_trained",
            ),
        ],
        "data/spans.py": [
            (
                "raise _hidden_field_error(index, field)",
                "pass",
                "data/test_masks.py::test_what_is_said_is_shown_or_refused_or_counted",
            ),
            (
                "start = before + len(known)",
                "start = before",
                MASKS,
            ),
        ],
        "data/source.py": [
            (
                "return [name for name, found in splits.items() if found == chosen]",
                "return list(splits)",
                "data/test_sources.py::test_splits_that_the_names_of_files_tell_are_kept_apart",
            ),
        ],
        "data/factory.py": [
            (
                '"the chat template": _hash_text(json.dumps(self.tokenizer.chat_template)),',
                "",
                "data/test_cache.py::test_a12_a_key_that_changes_rows_misses_and_is_named",
            ),
        ],
        "data/cache.py": [
            (
                "return all(checksum(entry / name) == known for name, known in sums.items())",
                "return all((entry / name).exists() for name in sums)",
                "test_faults.py::test_a_flipped_bit_in_the_cache_is_not_served",
            ),
        ],
        "checkpoint/retention.py": [
            (
                "sorted(steps)[-keep_last_n:]",
                "sorted(steps)[-keep_last_n - 1 :]",
                f"{RETENTION}::test_the_last_the_best_and_every_nth_stay[one process--falling]",
            ),
            (
                "[:keep_best_n]",
                "[: keep_best_n + 1]",
                f"{RETENTION}::test_the_last_the_best_and_every_nth_stay[one process--rising]",
            ),
            (
                'sign = 1 if mode == "min" else -1',
                "sign = 1",
                f"{RETENTION}::test_larger_is_better_when_the_metric_says_so",
            ),
        ],
        "checkpoint/engine.py": [
            (
                "self.last_saved = step if was_loaded or step in self.steps() else -1",
                "self.last_saved = step",
                f"{LOST}::test_an_export_that_a_kill_has_cut_is_made_at_the_next_start",
            ),
            (
                'for left in self.directory.glob(f"{UNFINISHED}*"):',
                "for left in ():",
                f"{LOST}::test_leftovers_are_removed_and_what_links_point_to_is_not",
            ),
            (
                "step >= max(config.save_after_step, 1)",
                "step > max(config.save_after_step, 1)",
                "checkpoint/test_orbax.py::test_saves_are_due_by_the_step_number",
            ),
        ],
        "checkpoint/files.py": [
            (
                "if found != digest:",
                "if False:",
                "checkpoint/test_orbax.py::test_damage_to_any_file_is_found",
            ),
        ],
        "checkpoint/compatibility.py": [
            (
                "if differing != [DIGEST] or DIGEST not in before:",
                "if True:",
                f"{LOST}::test_other_rows_under_the_same_path_do_not_continue_a_run",
            ),
        ],
        "recipe/secrets.py": [
            (
                'text = text.replace(form, "${env}")',
                "pass",
                "trainer/test_python.py::test_what_came_from_the_environment_is_in_no_file_of_the_run",
            ),
        ],
        "recipe/section.py": [
            ('"K": 10**3', '"K": 2**10', "recipe/test_numbers.py::test_a37_whole_numbers"),
            (
                "value = value / 100",
                "value = value / 10",
                "recipe/test_numbers.py::test_a37_numbers",
            ),
        ],
    }.items()
    for rest in mutations
)


if __name__ == "__main__":
    sys.exit(main())
