"""How the sequences of a step are cut: into microbatches, over devices and over processes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.batch import Batch
from jaxtrain.parallel.mesh import num_batch_shards
from jaxtrain.parallel.sharding import MESH_AXES
from jaxtrain.recipe.errors import DataError, RecipeError
from jaxtrain.recipe.mesh import length_multiple, refuse_uneven
from jaxtrain.recipe.trainer import TrainerConfig

Extras = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name → dtype and shape, for each sequence, of what a batch has besides its tokens."""


@dataclass(frozen=True)
class BatchLayout:
    """A step works on `num_microbatches` times `microbatch_sequences`, over all devices."""

    mesh: Mesh
    num_microbatches: int
    microbatch_sequences: int
    sequences_per_sample: int = 1
    """Neighbouring sequences that belong together, such as those of a pair."""
    batch_tokens: int = 0
    """With it a microbatch has as many sequences as fit, not `microbatch_sequences`; 0 is off."""

    @classmethod
    def of(cls, config: TrainerConfig, mesh: Mesh) -> "BatchLayout":
        """RecipeError when `deepspeed.train_batch_size` contradicts the other keys."""
        shards, stages = num_batch_shards(mesh), mesh.shape["pipeline"]
        size, accumulation = config.micro_batch_size, config.gradient_accumulation_steps
        num_microbatches = accumulation
        if stages > 1:
            num_microbatches = config.pipeline.num_microbatches(
                stages=stages, micro_batch_size=size, accumulation=accumulation
            )
        written, computed = config.deepspeed.train_batch_size, size * accumulation * shards
        if written not in (None, computed):
            raise RecipeError(
                f"deepspeed.train_batch_size: {written} is not micro_batch_size {size} x "
                f"gradient_accumulation_steps {accumulation} x {shards} batch shards = {computed}; "
                "remove it"
            )
        together = config.data.SEQUENCES_PER_SAMPLE
        sequences, tokens = computed // num_microbatches * together, config.data.batch_tokens
        return cls(mesh, num_microbatches, sequences, together, tokens)

    @property
    def stages(self) -> int:
        """Pipeline stages. With more than one, all microbatches enter the pipeline at once."""
        return self.mesh.shape["pipeline"]

    @property
    def global_batch(self) -> int:
        """Sequences per step."""
        return self.num_microbatches * self.microbatch_sequences

    def step_sequences(self, sequence_tokens: int) -> int:
        """Sequences per step where they are padded to so many tokens."""
        fitting = self.batch_tokens // (sequence_tokens * self.sequences_per_sample)
        return self.global_batch * max(1, fitting)

    @property
    def sharding(self) -> NamedSharding:
        """Of leaves [M, B, ...]: sequences are split, microbatches are not."""
        return NamedSharding(self.mesh, P(None, MESH_AXES["batch"]))

    @property
    def batch_shardings(self) -> Batch:
        """Of all leaves: those [M, B, T] are split over `context` too, in the order of the row."""
        rows = self.sharding
        tokens = NamedSharding(self.mesh, P(None, MESH_AXES["batch"], MESH_AXES["tokens"]))
        return Batch(tokens, tokens, tokens, tokens, rows, extras=rows)  # type: ignore[arg-type]

    @property
    def length_multiple(self) -> int:
        """What the length of sequences is a multiple of, so that devices may share them."""
        return length_multiple(self.mesh.shape["context"])

    @cached_property
    def process_sequences(self) -> np.ndarray:
        """int64 [sequences]: those of a microbatch that devices of this process hold, ascending.

        Processes whose devices share a batch shard, as with `tensor` across hosts, hold the same.
        """
        held = self.sharding.addressable_devices_indices_map((1, self.microbatch_sequences))
        is_held = np.zeros(self.microbatch_sequences, bool)
        for index in held.values():
            is_held[index[1]] = True  # type: ignore[index]
        return np.flatnonzero(is_held)

    def refuse_too_few(self, num_sequences: int) -> None:
        """DataError when some shard would never see a sequence."""
        if num_sequences < (shards := num_batch_shards(self.mesh)):
            raise DataError(
                f"{num_sequences} training sequences are fewer than the {shards} batch shards; "
                "write min_iterations to repeat them, or a smaller mesh.data and mesh.fsdp"
            )

    def refuse_uneven(self, lengths: Iterable[int]) -> None:
        """RecipeError when the devices of `context` cannot share sequences of such a length."""
        for length in lengths:
            refuse_uneven(length, self.mesh.shape["context"])

    def on_devices(self, batch: Batch) -> Batch:
        """Global arrays of a host batch, whose sequences are `process_sequences`, or so many for
        each of them."""

        def place(sharding: NamedSharding, a: Any) -> jax.Array:
            a = np.asarray(a)
            times = a.shape[1] // len(self.process_sequences)

            def shard(index: Any) -> np.ndarray:
                start, stop, _ = index[1].indices(times * self.microbatch_sequences)
                first = times * np.searchsorted(self.process_sequences, start // times)
                return a[:, first : first + stop - start, *index[2:]]

            shape = (a.shape[0], times * self.microbatch_sequences, *a.shape[2:])
            return jax.make_array_from_callback(shape, sharding, shard)

        place_all = lambda sharding, part: jax.tree.map(partial(place, sharding), part)
        return jax.tree.map(place_all, self.batch_shardings, batch)

    def batch_shapes(self, sequence_tokens: int, extras: Extras = MappingProxyType({})) -> Batch:
        """Shapes and shardings of a batch, to compile without data."""
        step, placed = self.step_sequences(sequence_tokens), self.batch_shardings
        lead = (self.num_microbatches, step // self.num_microbatches)

        def shape(dtype: Any, *tail: int, sharding: Any = placed.rows) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*lead, *tail), dtype, sharding=sharding)

        per_token = partial(shape, sharding=placed.tokens)
        tokens, weights = (per_token(dtype, sequence_tokens) for dtype in ("int32", "float32"))
        more = {name: shape(dtype, *tail) for name, (dtype, tail) in extras.items()}
        return Batch(tokens, tokens, tokens, weights, shape("int32"), more)
