"""`jaxtrain data` as a person runs it: on the terminal, as a page, and in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape

import pytest
import yaml
from click.testing import CliRunner

from jaxtrain.cli import cli
from jaxtrain.data.command import show_data
from jaxtrain.recipe.errors import CONTROL, RecipeError, printable
from jaxtrain.recipe.resolve import get_config
from tests.runs import model_folder
from tests.tiny import chat, tiny_tokenizer

ROWS = [
    chat(f"number {n}?", "yes <b>&amp;</b>" if n % 2 else "no", "and\nnow?", "no") for n in range(9)
]

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def recipe(tmp_path):
    """A recipe in a file; a long prompt and a copy are among its rows."""
    model_folder(tmp_path / "model")
    rows = [{"messages": turns} for turns in [*ROWS, ROWS[0], chat("so " * 200, "no")]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    written = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {
            "sources": [{"type": "jsonl", "path": str(tmp_path / "rows.jsonl"), "name": "chats"}],
            "max_length": 128, "pack_samples": True, "num_proc": 1,
        },
        "micro_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written))
    return tmp_path / "recipe.yaml"


def run(recipe, *arguments):
    program = (
        "import sys\n"
        "from jaxtrain.cli import cli\n"
        "cli(sys.argv[1:], standalone_mode=False)\n"
        "print('jax imported:', 'jax' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments[:1]), str(recipe), *arguments[1:]],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained_on_terminal(text):
    _, documents = text.split("ends a line\n", 1)
    return re.findall(r"⟦(.*?)⟧", documents.replace("⏎\n", "\n"), re.DOTALL)


def shown(recipe, **options):
    config = get_config(recipe)
    return show_data(config, tiny_tokenizer(), max_positions=256, **options)


def test_the_command_prepares_and_shows_without_jax_and_without_weights(recipe):
    text = run(recipe, "data")
    assert "chats: 11 records read, 10 documents\n  dropped 1: longer than max_length" in text
    assert "cache: miss, nothing prepared yet" in text and "jax imported: False" in text
    assert {*trained_on_terminal(text)} <= {"no<|im_end|>", "yes <b>&amp;</b><|im_end|>"}
    assert "cache: hit" in run(recipe, "process-data")  # also another name of it
    assert "warning: 1 of 10 training documents are copies of another" in text


def test_a_batch_is_that_of_its_step(recipe, capsys):
    data = shown(recipe, batch=2)
    text = capsys.readouterr().out
    rows = data.train.sequence_numbers(data.train.advance(0, 1)).ravel()
    expected = [
        (data.ledger.sources[origin.source].label, origin.record)
        for row in rows if row >= 0
        for origin in data.train.origins(int(row))
    ]  # fmt: skip
    titles = re.findall(r"── (\S+), record (\d+) ", text)
    assert [(label, int(row)) for label, row in titles] == expected and expected
    assert data.steps_per_epoch == 2 and "Step 2: 2 of 2 of epoch 1, 4 sequences" in text
    number = expected[0][1]
    first = ROWS[number % len(ROWS)]
    assert f"user⏎\n{first[0]['content']}<|im_end|>" in text
    shown(recipe, batch=49)  # behind the first epoch, in the order of a later one
    assert "Step 49: 1 of 2 of epoch 25" in capsys.readouterr().out


def test_more_devices_have_more_rows_a_step(recipe, capsys):
    one, four = shown(recipe, batch=1), shown(recipe, batch=1, devices=4)
    assert (one.train.shape.step_sequences, four.train.shape.step_sequences) == (4, 16)
    assert "16 sequences" in capsys.readouterr().out


def page_of(recipe, tmp_path, **options):
    shown(recipe, html=tmp_path / "out" / "page.html", **options)
    return (tmp_path / "out" / "page.html").read_text()


def spans(page, kind):
    found = re.findall(rf'<span class="{kind}(?: special)?">(.*?)</span>', page, re.DOTALL)
    return [unescape(text) for text in found]


def test_the_page_says_the_same(recipe, tmp_path, capsys):
    page = page_of(recipe, tmp_path, batch=1)
    on_terminal = trained_on_terminal(capsys.readouterr().out)
    trained = "".join(spans(page, "trained")).removeprefix("trained")  # that of the legend
    assert trained == "".join(on_terminal) and "yes <b>&amp;</b>" in trained
    assert "<b>" not in page  # nothing of the data is markup
    assert '<span class="trained special">&lt;|im_end|&gt;</span>' in page
    assert '<span class="masked special">&lt;|im_start|&gt;</span>' in page
    assert "<td>chats</td><td>11</td><td>1 longer than max_length</td>" in page
    assert 'class="warning">1 of 10 training documents are copies' in page
    counts = [int(n) for n in re.findall(r"tokens: (\d+) documents</title>", page)]
    assert sum(counts) == 10
    assert not re.search(r'(src|href)="', page) and "http" not in page  # it needs nothing else


def test_a_page_that_cannot_be_written_is_refused_first(recipe, tmp_path):
    done = CliRunner().invoke(cli, ["data", str(recipe), "--html", str(tmp_path)])
    assert done.exit_code == 2 and "is a directory" in done.output
    assert not (tmp_path / "cache").exists()


PAIRS = [
    {"prompt": f"number {n}?", "chosen": "yes <b>", "rejected": "no", "reference_score_chosen": n}
    for n in range(5)
]
JUDGED = [{"prompt": f"number {n}?", "completion": "yes", "label": n < 3} for n in range(5)]


def objective(recipe, tmp_path, kind, rows):
    """The recipe for another trainer, which is checked and not supported yet."""
    written = yaml.safe_load(recipe.read_text()) | {"type": kind}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    del written["data"]["pack_samples"]
    written["data"]["max_prompt_length"] = 64
    recipe.write_text(yaml.safe_dump(written))


def test_pairs_are_shown_before_their_trainer_is_built(recipe, tmp_path):
    objective(recipe, tmp_path, "dpo", PAIRS)
    page = tmp_path / "page.html"
    text = run(recipe, "data", "--html", str(page), "--batch", "1")
    assert (
        "note      a run is refused: type: 'dpo' is not supported yet; supported: sft, causal"
        in text
    )
    assert "chats: 5 records read, 5 documents" in text and "5 documents in 10 sequences" in text
    titles = re.findall(r"── chats, record (\d), (\w+)(?:, reference score (\d))? ", text)
    assert len(titles) == 8  # 2 pairs, accumulated twice
    for chosen, rejected in zip(titles[::2], titles[1::2], strict=True):
        assert chosen == (chosen[0], "chosen", chosen[0])
        assert rejected == (chosen[0], "rejected", "")
    assert {*trained_on_terminal(text)} == {"yes <b><|im_end|>", "no<|im_end|>"}
    assert "yes &lt;b&gt;" in page.read_text() and ", rejected (" in page.read_text()
    with pytest.raises(
        RecipeError, match="type: 'dpo' is not supported yet; supported: sft, causal"
    ):
        get_config(recipe)


def test_judged_rows_are_shown_with_their_label(recipe, tmp_path):
    objective(recipe, tmp_path, "kto", JUDGED)
    text = run(recipe, "data", "--batch", "1")
    labels = re.findall(r"── chats, record (\d), label (\w+) ", text)
    assert len(labels) == 4
    assert all(label == ("true" if int(row) < 3 else "false") for row, label in labels)
    assert "yes<|im_end|>" in trained_on_terminal(text) and "pack_samples" not in text


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = """<script>
const all = (query) => [...document.querySelectorAll(query)];
const colour = (query) => getComputedStyle(all(query)[0]).backgroundColor;
document.title = JSON.stringify({
  trained: colour("pre .trained"), masked: colour("pre .masked"),
  bars: all("#lengths rect").map((bar) => bar.getBBox().height),
  text: all("pre .trained").map((span) => span.textContent).join(""),
  whole: all("body")[0].innerText, ran: window.ran ?? null, tags: all("*").map((e) => e.localName),
  wide: document.documentElement.scrollWidth <= innerWidth,
});
</script>"""


def in_a_browser(page, tmp_path):
    """What the probe finds in a page when the browser has shown it."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")
    file = tmp_path / "probed.html"
    file.write_text(page.replace("</body></html>", f"{PROBE}</body></html>"))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user",
         "--virtual-time-budget=2000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stdout[:500] + done.stderr[-2000:]
    return json.loads(unescape(title[1]))


@pytest.mark.slow
def test_the_page_in_a_browser(recipe, tmp_path):
    page = page_of(recipe, tmp_path, batch=1)
    found = in_a_browser(page, tmp_path)
    assert found["trained"] != found["masked"] and found["trained"] != "rgba(0, 0, 0, 0)"
    assert found["bars"] and max(found["bars"]) == 160 and min(found["bars"]) >= 1
    assert found["text"] == "".join(spans(page, "trained")).removeprefix("trained")
    assert found["wide"]


HOSTILE = (
    "<script>ran = 1</script>", "</pre></body></html><script>ran = 2</script>", "</style><b>x</b>",
    "<img src=x onerror='ran = 3'>", "<svg/onload=ran=4>", "\"><iframe srcdoc='<script>top.ran=5</script>'>",
    "&lt;i&gt; &#60;script&#62;", "\x1b[2J\x1b]0;title\x07red\x9b31m", "a\u202etxt.exe\u2066b",
)  # fmt: skip


def hostile_page(recipe, tmp_path):
    """A page of such rows, from a source of such a name."""
    rows = [{"messages": chat(text, text), "x": 1} for text in HOSTILE]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    written = yaml.safe_load(recipe.read_text()) | {"micro_batch_size": 8}
    written["data"]["sources"][0]["name"] = "".join(HOSTILE)
    recipe.write_text(yaml.safe_dump(written))
    return page_of(recipe, tmp_path, batch=1)


def test_nothing_of_hostile_data_is_markup_or_a_control_character(recipe, tmp_path, capsys):
    page = hostile_page(recipe, tmp_path)
    tags = {"script", "img", "iframe", "b", "i"} & set(re.findall(r"<(\w+)", page))
    assert not tags and page.count("<svg") == page.count("</pre></body>") + 1 == 1
    assert page.count("</style>") == page.count("</html>") == 1
    assert not CONTROL.search(page) and not CONTROL.search(capsys.readouterr().out)
    shown = "".join(spans(page, "trained"))
    for text in HOSTILE:
        assert printable(text) in shown


@pytest.mark.slow
def test_hostile_data_runs_nothing_in_a_browser_and_is_shown(recipe, tmp_path):
    found = in_a_browser(hostile_page(recipe, tmp_path), tmp_path)
    assert found["ran"] is None and found["tags"].count("script") == 1  # the probe
    assert not {"img", "iframe", "b", "i"} & {*found["tags"]} and found["tags"].count("svg") == 1
    assert found["wide"]
    for text in HOSTILE:
        assert printable(text) in found["text"]
        assert found["whole"].count(printable(text)) > len(HOSTILE)  # and in every heading


ASKING = """
from jaxtrain import DataSource, DataSourceConfig, SFTDataFactory, SFTTrainer


class AskingSource(DataSource):
    name = "asking-of-test"
    config: DataSourceConfig

    def load(self, config, split):
        trainer, factory = self.trainer, self.data_factory
        assert trainer.data_factory is factory and trainer.tokenizer is factory.tokenizer
        assert (trainer.global_rank, factory.world_size, factory.micro_batch_size) == (0, 1, 2)
        return [{"prompt": f"of {trainer.config.type}?", "response": "yes"}] * 3


class AskingTrainer(SFTTrainer):
    name = "asking-of-test"
"""


@pytest.mark.parametrize("command", ["data", "check"])
def test_a_source_of_the_user_may_read_its_trainer(recipe, command):
    written = yaml.safe_load(recipe.read_text())
    written |= {"type": "asking-of-test", "code": "asking.py"}
    written["data"]["sources"] = [{"type": "asking-of-test"}]
    written["model"]["from_scratch"] = True
    recipe.write_text(yaml.safe_dump(written))
    (recipe.parent / "asking.py").write_text(ASKING)
    out = run(recipe, command)
    assert command == "check" or "of asking-of-test?" in out
