"""Loss and gradient of real chats with real weights, packed into rows and each alone.

Prints as JSON: documents, trained tokens, both sums of the loss, both gradient norms, and the norm
of the gradients' difference.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import SFTTrainer, get_config
from jaxtrain.data.packing import pack
from jaxtrain.data.plan import BatchPlan, BatchShape

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
ROW_TOKENS, ROWS = 2048, 2
LENGTHS = (512, 1024, ROW_TOKENS)
"""Of the rows that hold one document: each compiles once."""


def main(folder: Path) -> None:
    changes = [f"run_dir={folder}/run", f"checkpoint.output_dir={folder}/out",
               f"data.max_length={ROW_TOKENS}", "data.sources.0.sample_count=60",
               "micro_batch_size=1"]  # fmt: skip
    trainer = SFTTrainer(get_config(RECIPE, changes))
    params, data = trainer.state.params, trainer.data.train

    @jax.jit
    def loss_and_gradient(params, batch):
        def total(params):
            loss = trainer.loss_fn(trainer.language_model.merge(params), batch, jax.random.key(0))
            return loss.total, loss.weight

        return jax.value_and_grad(total, has_aux=True)(params)

    def summed(batches):
        losses, weights, gradients = 0.0, 0.0, jax.tree.map(jnp.zeros_like, params)
        for batch in batches:
            (loss, weight), gradient = loss_and_gradient(params, batch)
            losses, weights = losses + float(loss), weights + float(weight)
            gradients = jax.tree.map(jnp.add, gradients, gradient)
        return losses, weights, gradients

    # The rows of the most documents: there is most to be kept apart.
    rows = np.argsort(-np.diff(data.packing.offsets), kind="stable")[:ROWS]
    chosen = np.concatenate([data.packing.documents[data.pieces(int(row))] for row in rows])
    alone = pack(data.documents.lengths, ROW_TOKENS, "none", chosen)

    def row_alone(row: int):
        tokens = min(n for n in LENGTHS if alone.lengths[row] <= n)
        plan = BatchPlan(data.documents, alone, BatchShape(1, 1), (tokens,), seed=None)
        return plan.fill_batch(np.array([row]), tokens)

    with jax.set_mesh(trainer.mesh):
        packed = summed(data.fill_batch(np.array([row]), data.lengths[-1]) for row in rows)
        apart = summed(row_alone(row) for row in range(len(chosen)))
        difference = jax.tree.map(jnp.subtract, packed[2], apart[2])
        norms = [float(jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree))))
                 for tree in (packed[2], apart[2], difference)]  # fmt: skip
    found = {"documents": len(chosen), "weights": (packed[1], apart[1]),
             "losses": (packed[0], apart[0]), "norms": norms}  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
