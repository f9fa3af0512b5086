"""How the rows of an update are cut: over devices, and into microbatches."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.batch import Batch
from jaxtrain.parallel.mesh import num_batch_shards
from jaxtrain.parallel.sharding import MESH_AXES
from jaxtrain.recipe.errors import DataError, RecipeError
from jaxtrain.recipe.trainer import TrainerConfig


@dataclass(frozen=True)
class BatchLayout:
    """An update works on `num_microbatches` times `microbatch_rows` rows, over all devices."""

    mesh: Mesh
    stages: int
    num_microbatches: int
    microbatch_rows: int

    @classmethod
    def of(cls, config: TrainerConfig, mesh: Mesh) -> "BatchLayout":
        """RecipeError when the recipe says another batch."""
        shards, stages = num_batch_shards(mesh), mesh.shape["pipeline"]
        rows, accumulation = config.micro_batch_size, config.gradient_accumulation_steps
        num_microbatches = accumulation
        if stages > 1:
            num_microbatches = config.pipeline.num_microbatches(
                stages=stages, micro_batch_size=rows, accumulation=accumulation
            )
        written, computed = config.deepspeed.train_batch_size, rows * accumulation * shards
        if written not in (None, computed):
            raise RecipeError(
                f"deepspeed.train_batch_size: {written} is not micro_batch_size {rows} x "
                f"gradient_accumulation_steps {accumulation} x {shards} batch shards = {computed}; "
                "remove it"
            )
        microbatch_rows = computed // num_microbatches * config.data.ROWS_PER_SAMPLE
        return cls(mesh, stages, num_microbatches, microbatch_rows)

    @property
    def global_batch(self) -> int:
        """Rows an update."""
        return self.num_microbatches * self.microbatch_rows

    def refuse_too_few(self, train_rows: int) -> None:
        """DataError when some shard would never see a row."""
        if train_rows < (shards := num_batch_shards(self.mesh)):
            raise DataError(
                f"{train_rows} training rows are fewer than the {shards} batch shards; write "
                "min_iterations to repeat them, or a smaller mesh.data and mesh.fsdp"
            )

    @property
    def whole_batch(self) -> bool:
        """A pipeline takes all microbatches at once and cuts them up itself."""
        return self.stages > 1

    @property
    def batch_sharding(self) -> NamedSharding:
        """Of leaves [M, rows, ...]: rows are split, microbatches and tokens are not."""
        return NamedSharding(self.mesh, P(None, MESH_AXES["batch"]))

    def on_devices(self, batch: Batch) -> Batch:
        """This process's rows of a host batch, as global arrays."""
        place = jax.make_array_from_process_local_data
        return jax.tree.map(lambda a: place(self.batch_sharding, np.asarray(a)), batch)

    def batch_shapes(self, row_tokens: int) -> Batch:
        """Shapes and shardings of a batch, for compiling without data."""
        lead = (self.num_microbatches, self.microbatch_rows)

        def of(dtype: str, *tail: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*lead, *tail), dtype, sharding=self.batch_sharding)

        tokens = of("int32", row_tokens)
        return Batch(tokens, tokens, tokens, of("float32", row_tokens), of("int32"))
