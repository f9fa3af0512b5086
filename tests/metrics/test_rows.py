"""The rows of a run: their names, when there is one, and what they count."""

import pytest

from jaxtrain.metrics import meter as meter_module
from jaxtrain.metrics.meter import Meter
from jaxtrain.trainer.report import is_due
from tests.runs import metrics_of, recipe, trainer

STEPS = 6
EVALUATED = {"data": {"train_eval_split": [0.9, 0.1]}, "eval_interval": 1}
SHARED = {
    "epoch", "iter", "lr", "loss", "iter_time", "iter_tflops", "seqlen", "step_time", "step_tflops"
}  # fmt: skip
TRAINING = SHARED | {
    "grad_norm", "token_accuracy", "rows", "tokens", "trained_tokens", "pairs", "tokens_seen",
    "tokens_per_sec", "trained_tokens_per_sec", "mfu", "data_time", "data_share", "compile_time",
    "save_time", "padding_ratio", "packing_efficiency", "mem_peak", "eta",
}  # fmt: skip
EVALUATION = {
    "iter",
    "eval/loss",
    "loss/eval",
    "eval/perplexity",
    "eval/token_accuracy",
    "eval/tokens",
}


def written(folder, **changes):
    state = {"output_dir": str(folder / "state"), "save_every_n_steps": 3, "auto_resume": True}
    return recipe(folder, rows=40, train_iters=STEPS, **(EVALUATED | changes)) | {
        "checkpoint": state
    }


def training_rows(folder):
    rows = metrics_of(folder)
    return {row["iter"]: row for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def every_row(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every")
    run = trainer(written(folder))
    run.train()
    return folder, run


def test_a_row_has_these_names(every_row):
    folder, run = every_row
    for row in metrics_of(folder):
        assert set(row) == (TRAINING if "loss" in row else EVALUATION)
    rows = training_rows(folder)
    assert list(rows) == list(range(1, STEPS + 1))
    assert rows[1]["compile_time"] > 0 == rows[3]["compile_time"]
    assert rows[4]["save_time"] > 0 == rows[3]["save_time"]
    for row in rows.values():
        places = run.layout.global_batch * run.data.sequence_tokens
        assert row["seqlen"] == run.data.sequence_tokens
        assert row["padding_ratio"] == pytest.approx(1 - row["tokens"] / places)
        assert row["packing_efficiency"] == row["tokens"] / (row["rows"] * row["seqlen"])
        assert row["step_time"] + row["compile_time"] < 600 and row["mem_peak"] > 10_000_000
    assert rows[STEPS]["eta"] == 0


def test_a_row_has_the_flops_of_the_model(every_row):
    """6 FLOPs a parameter and token, 12 a head's width and pair; the sizes of `tests.runs`."""
    parameters = 6 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 64) + 384 * 32
    for row in training_rows(every_row[0]).values():
        flops = 6 * parameters * row["tokens"] + 12 * 8 * 8 * row["pairs"]
        assert row["step_tflops"] * row["step_time"] == pytest.approx(flops / 1e12)
        assert row["iter_tflops"] == row["step_tflops"] and row["mfu"] is None


@pytest.mark.covers("train_log_iter_interval", "loss_log_interval", "eval_log_iter_interval")
def test_fewer_rows_count_and_print_the_same_run(tmp_path, every_row, capsys):
    intervals = {"train_log_iter_interval": 3, "loss_log_interval": 2, "eval_log_iter_interval": 4}
    trainer(written(tmp_path, **intervals)).train()
    expected, found = training_rows(every_row[0]), training_rows(tmp_path)
    assert list(found) == [1, 3, 6]
    for step, row in found.items():
        for name in ("loss", "grad_norm", "lr", "tokens", "tokens_seen", "padding_ratio"):
            assert row[name] == expected[step][name], (step, name)
    printed = capsys.readouterr().out
    assert [f"step {n}/{STEPS} " in printed for n in range(1, STEPS + 1)] == [
        n in found for n in range(1, STEPS + 1)
    ]
    assert [f"evaluation at step {n}:" in printed for n in range(1, STEPS + 1)] == [
        n == 4 for n in range(1, STEPS + 1)
    ]
    assert len(metrics_of(tmp_path)) == 3 + STEPS
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert [f"INFO step {n}/{STEPS}  loss " in log for n in range(1, STEPS + 1)] == [
        n in (1, 2, 4, 6) for n in range(1, STEPS + 1)
    ]


def test_what_is_counted_goes_on_after_a_resume(tmp_path, every_row):
    """Traps A40, G10."""
    logged = {"train_log_iter_interval": 2, "eval_log_iter_interval": 2}
    trainer(written(tmp_path, exit_iteration=3, **logged)).train()
    run = trainer(written(tmp_path, **logged))
    run.train()
    expected, found = training_rows(every_row[0]), training_rows(tmp_path)
    assert list(found) == [1, 2, 4, 6]
    assert all(found[n]["tokens_seen"] == expected[n]["tokens_seen"] for n in found)
    assert run.report.num_evaluations == every_row[1].report.num_evaluations == STEPS


def test_zero_tells_nothing_and_the_file_has_the_evaluations(tmp_path, capsys):
    """Trap A26."""
    off = dict.fromkeys(
        ("train_log_iter_interval", "loss_log_interval", "eval_log_iter_interval"), 0
    )
    trainer(written(tmp_path, **off) | {"checkpoint": []}).train()
    printed = capsys.readouterr().out
    assert "step 1/" not in printed and "evaluation at" not in printed and "finished" in printed
    assert "  loss " not in (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    rows = metrics_of(tmp_path)
    assert [(row["iter"], set(row)) for row in rows] == [
        (n, EVALUATION) for n in range(1, STEPS + 1)
    ]


def test_a_loss_that_no_row_shows_reaches_the_terminal_at_info(tmp_path, capsys):
    changes = {"train_log_iter_interval": 0, "logger": {"level": "INFO"}, "train_iters": 1}
    trainer(recipe(tmp_path, **changes)).train()
    told = capsys.readouterr()
    assert "step 1/1" not in told.out and "INFO step 1/1  loss " in told.err


@pytest.mark.parametrize(
    ("every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6]), (9, [1])]
)
def test_the_first_update_and_every_nth_are_due(every, steps):
    assert [n for n in range(1, 8) if is_due(n, every)] == steps


def test_rates_are_over_the_interval_and_per_device(monkeypatch):
    """16 tokens of 2 x 10 places in 2 s of 3 updates; 600 + 40 FLOPs a token and pair."""
    clock = iter([0.0, 1.0, 1.0, 2.0, 2.0, 8.0, 10.0, 10.0])
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: next(clock))
    meter = Meter(
        flops_per_token=600.0, flops_per_pair=40.0, peak_flops=1e6, num_devices=2,
        step_sequences=lambda tokens: 2,
    )  # fmt: skip
    update = {"tokens": 16.0, "trained_tokens": 8.0, "pairs": 100.0, "rows": 2.0, "seqlen": 10.0}
    meter.count(update)
    meter.count(update)
    meter.restart()  # six seconds of something else
    meter.add_data_wait(1.0)
    meter.count(update | {"tokens": 4.0, "rows": 1.0})
    row = meter.build_row(update | {"tokens": 4.0, "rows": 1.0}, steps_left=3)
    flops = 600 * 36 + 40 * 300
    assert row["iter_time"] == row["step_time"] == pytest.approx(4 / 3)
    assert row["tokens_per_sec"] == 9 and row["trained_tokens_per_sec"] == 6
    assert row["data_time"] == pytest.approx(1 / 3) and row["data_share"] == 0.25
    assert row["step_tflops"] == row["iter_tflops"] == flops / 4 / 2 / 1e12
    assert row["mfu"] == pytest.approx(flops / 4 / 2 / 1e6)
    assert (row["padding_ratio"], row["packing_efficiency"]) == (0.8, 0.4)
    assert (row["tokens_seen"], row["eta"]) == (36, 4.0)
