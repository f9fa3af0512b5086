"""What a run prints fits the terminal."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console as RichConsole

from jaxtrain.metrics import console as module
from jaxtrain.metrics.console import Console, format_progress, format_times

ROW = {
    "iter": 1234, "loss": 2.34567, "grad_norm": 12.345, "lr": 1.5e-5, "tokens_per_sec": 123456.0,
    "trained_tokens_per_sec": 65432.0, "data_share": 0.01, "mfu": 0.456, "eta": 12345.0,
}  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_a_row_fits_its_terminal_and_keeps_the_time_that_is_left(width):
    line = format_progress(ROW, 98765, width)
    assert len(line) <= max(width, 44)
    assert line.startswith("step 1234/98765  loss 2.3457") and line.endswith("  ETA 3:25:45")
    assert format_progress(ROW, 98765).startswith(line[: len("step 1234/98765  loss 2.3457")])


def test_the_least_important_goes_first():
    seen = [format_progress(ROW, 98765, width).count("  ") + 1 for width in range(40, 160)]
    assert seen == sorted(seen) and {3, 9} <= {*seen}
    assert "tokens/s" in format_progress(ROW, 98765, 80)
    assert "data wait" not in format_progress(ROW, 98765, 110)


def terminal(width: int) -> tuple[Console, io.StringIO]:
    console, stream = Console(), io.StringIO()
    console._console = RichConsole(
        file=stream, force_terminal=True, width=width, highlight=False, soft_wrap=True
    )
    return console, stream


@pytest.mark.parametrize("width", [40, 80, 120])
def test_rows_stay_in_the_scrollback_and_the_bar_does_not(width):
    console, stream = terminal(width)
    for step in range(1, 6):
        console.progress(ROW | {"iter": step}, 5)
        console._redraw_at = 0.0
        console.tick(step, 5, 10.0)
    console.close()
    lines = rendered(stream.getvalue(), width)
    assert [line.split("/")[0] for line in lines] == [f"step {step}" for step in range(1, 6)]


def test_the_bar_is_not_drawn_for_every_step():
    console, stream = terminal(80)
    for step in range(1000):
        console.tick(step, 1000, 1.0)
    console.close()
    assert len(stream.getvalue()) < 2000


def test_every_second_is_counted_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    console = Console(prints=False)
    console.spent_s["import"] = 3.0
    with console.timing("evaluation"):
        now[0] += 2
        with console.phase("compiling", "compile"):
            now[0] += 5
        now[0] += 1
    now[0] += 4
    assert console.spent_s == {"import": 3.0, "evaluation": 3.0, "compile": 5.0}
    assert console.elapsed_s == 15
    assert format_times(console.spent_s | {"step": 1.0, "wait": 0.01}, console.elapsed_s) == (
        "import 3.0 s, compile 5.0 s, step 1.0 s, evaluation 3.0 s, other 3.0 s"
    )


def rendered(text: str, width: int) -> list[str]:
    """What a terminal shows of this output, for the sequences that the console writes."""
    lines, row, column, i = [""], 0, 0, 0
    while i < len(text):
        if text[i] == "\x1b":
            end = next(j for j in range(i + 2, len(text)) if text[j].isalpha())
            argument, what = text[i + 2 : end], text[end]
            if what == "A":
                row -= int(argument or 1)
            elif what == "K":
                lines[row] = ""
            i = end + 1
            continue
        if text[i] == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text[i] == "\r":
            column = 0
        else:
            assert column < width, "the line is cut or wrapped"
            lines[row] = lines[row][:column].ljust(column) + text[i] + lines[row][column + 1 :]
            column += 1
        i += 1
    return [line for line in lines if line.strip()]
