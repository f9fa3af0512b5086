"""Where a run is follows from plain numbers: properties over random recipes and moments."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.data import BatchShape
from jaxtrain.recipe.resolve import get_config
from jaxtrain.trainer.progress import Horizon, Progress
from tests.data.made import documents_of, plan_of

DATA = {"sources": ["a/b"], "eval_sources": ["a/c"]}
CONFIG = get_config({"model": {"name_or_path": "m"}, "data": DATA, "eval_interval": 3})
counts = st.integers(0, 40)
horizons = st.builds(
    Horizon,
    steps=st.integers(0, 30),
    epoch_sequences=st.integers(1, 12),
    epochs=st.none() | st.integers(0, 4),
    exit_step=counts,
    exit_after=counts,
)
moments = st.builds(
    Progress,
    step=counts,
    position=counts,
    first_step=counts,
    schedule_start=counts,
    more_steps=st.integers(-9, 9),
    eval_metrics=st.sampled_from([{}, {"eval/loss": 0.0}]),
    is_stopping=st.booleans(),
    signal=st.sampled_from([None, "SIGTERM"]),
)


def due(progress, horizon, *, has_eval=True, requested=False, **keys):
    config = CONFIG.model_copy(update=keys)
    return progress.evaluation_is_due(config, horizon, has_eval=has_eval, requested=requested)


@given(moments, horizons)
def test_the_last_step_is_the_first_limit_and_ends_the_run(progress, horizon):
    last = progress.last_step(horizon)
    limits = [horizon.steps, horizon.exit_step, horizon.exit_after and progress.first_step]
    assert last <= horizon.steps
    assert not horizon.exit_step or last <= horizon.exit_step
    assert not horizon.exit_after or last <= progress.first_step + horizon.exit_after
    assert last == horizon.steps or any(limits[1:])
    assert progress.is_complete(horizon) or progress.step < last
    progress.step = last
    assert progress.is_complete(horizon) and progress.is_finished(horizon)


@given(moments, horizons)
def test_positions_count_sequences_of_epochs(progress, horizon):
    index, done = progress.epoch_index(horizon), progress.epochs_done(horizon)
    assert index <= done < index + 1
    assert progress.is_epoch_end(horizon) == (progress.position > 0 and done == index)
    before = progress.position
    progress.skip_epoch(horizon)
    assert 0 <= progress.position - before < horizon.epoch_sequences
    assert progress.epochs_done(horizon) == progress.epoch_index(horizon)


@given(moments, horizons)
def test_a_signal_preempts_what_is_not_complete(progress, horizon):
    preempted = progress.is_preempted(horizon)
    assert preempted == (bool(progress.signal) and not progress.is_complete(horizon))
    point = progress.save_point(horizon, requested=False)
    assert point.training_ended == (progress.is_finished(horizon) and not preempted)
    assert (point.epoch_ended > 0) == progress.is_epoch_end(horizon)
    assert not preempted or not due(progress, horizon)


@given(moments, horizons)
def test_an_evaluation_is_due_once_where_the_recipe_says(progress, horizon):
    assert due(progress, horizon, requested=True)
    assert not due(progress, horizon, has_eval=False)
    if progress.eval_metrics:
        assert not due(progress, horizon)
    elif not progress.is_preempted(horizon) and progress.step:
        at_end = progress.is_finished(horizon)
        assert due(progress, horizon) == (at_end or progress.step % 3 == 0)
        assert due(progress, horizon, eval_at_end=False) == (progress.step % 3 == 0)
        for first in (progress.step, progress.step + 1, 20):
            after = due(progress, horizon, eval_after_step=first, eval_at_end=False)
            assert after == (progress.step % 3 == 0 and progress.step >= first)
        by_epoch = progress.is_epoch_end(horizon) and progress.epoch_index(horizon) % 2 == 0
        keys = {"eval_interval": 0, "eval_every_n_epochs": 2, "eval_at_end": False}
        assert due(progress, horizon, **keys) == by_epoch


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """11 sequences, 3 a step."""
    documents = documents_of([9] * 11, tmp_path_factory.mktemp("documents"))
    return plan_of(documents, capacity=10, shape=BatchShape(1, 3))


@given(moments)
def test_what_a_checkpoint_keeps_is_json_and_comes_back_but_for_what_is_reset(plan, progress):
    saved = json.loads(json.dumps(progress.state_dict()))
    again = Progress()
    again.load_state_dict(saved, plan)
    assert again.state_dict() == progress.state_dict()
    again.load_state_dict(saved, plan, reset=("data", "scheduler"))
    assert (again.step, again.position, again.schedule_start) == (progress.step, 0, progress.step)


@pytest.mark.parametrize(
    ("saved", "sequences"), [({"position": 5}, 14), ({}, 11), ({"position": 5, "sequences": 7}, 7)]
)
def test_a_checkpoint_that_counts_batches_or_steps_alone_is_continued_there(plan, saved, sequences):
    progress = Progress()
    progress.load_state_dict(saved | {"step": 4}, plan)
    assert (progress.position, progress.more_steps) == (sequences, 0)


@given(moments, st.integers(1, 4))
def test_passes_that_began_with_steps_of_another_size_are_walked_to_their_end(plan, progress, size):
    saved = progress.state_dict() | {"lineage": {"global_batch": size}}
    again = Progress()
    again.load_state_dict(saved, plan)
    config = CONFIG.model_copy(update={"epochs": 5})
    horizon = Horizon.of(config, plan, again.more_steps)
    while again.position < 5 * plan.epoch_sequences:
        assert not again.is_complete(horizon) or size == 3
        again.position, again.step = plan.advance(again.position), again.step + 1
    assert again.is_complete(horizon) and (again.step == horizon.steps or size == 3)
