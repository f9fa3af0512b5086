"""What a training step keeps grows with the tokens of a row, not with their square."""

from jaxtrain import SFTTrainer, get_config
from tests.runs import model_folder, recipe


def temporaries(folder, tokens, **model):
    """Bytes that the compiled step of a model of width 256 takes beside state and batch."""
    written = recipe(folder, data={"max_length": tokens}, model=model)
    model_folder(
        folder / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=32,
        max_position_embeddings=tokens,
    )  # fmt: skip
    run = SFTTrainer(get_config(written), "plan")
    lowered = run.step.lower(run.run.state_shapes, run.layout.batch_shapes(tokens))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_four_times_the_tokens_take_four_times_the_memory(tmp_path):
    assert temporaries(tmp_path, 16_384) < 4.2 * temporaries(tmp_path, 4_096)
