"""Runs of Weights & Biases, kept on disk: one over all restarts, without secrets."""

import json
import struct

import pytest
import yaml

from jaxtrain import SFTTrainer, get_config
from jaxtrain.metrics.wandb_run import check_login
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.logger import WandbConfig
from tests.runs import metrics_of, recipe, trainer


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


def records(file):
    """The records of an offline run: a log in blocks of 32 KiB after a header of 7 bytes, each piece
    with checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, place, held = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            return
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield pb.Record.FromString(held)
            held = b""


def history(file):
    """(step, name → value) of every row that was sent."""
    for record in records(file):
        if record.HasField("history"):
            items = {
                i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item
            }
            yield record.history.step.num, items


@pytest.mark.covers("wandb.enable", "wandb.mode", "wandb.name", "wandb.project", "wandb.entity")
def test_one_run_over_three_starts_with_rising_steps(tmp_path):
    """Trap A13."""
    pytest.importorskip("wandb")
    state = {"output_dir": str(tmp_path / "state"), "save_every_n_steps": 1, "auto_resume": True}
    wandb = {"enable": True, "mode": "offline", "project": "tests", "name": "one"}
    wandb["entity"] = "team"
    written = recipe(tmp_path, train_iters=3, wandb=wandb) | {"checkpoint": state}
    for end in (1, 2, 3):
        trainer(written | {"exit_iteration": end}).train()
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    runs = [r.run for file in files for r in records(file) if r.HasField("run")]
    ids = {run.run_id for run in runs}
    assert {(r.entity, r.project, r.display_name) for r in runs} == {("team", "tests", "one")}
    assert len(files) == 3 and ids == {(tmp_path / "run" / "wandb-id").read_text()}
    rows = [row for file in files for row in history(file)]
    assert [step for step, _ in rows] == [1, 2, 3]
    expected = metrics_of(tmp_path)
    assert [row["loss"] for _, row in rows] == [pytest.approx(row["loss"]) for row in expected]


@pytest.mark.covers("wandb.id")
def test_a_written_id_is_used_and_no_secret_is_sent(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WHERE", secret := str(tmp_path / "quite-secret.jsonl"))
    monkeypatch.chdir(tmp_path)
    wandb = {"enable": True, "mode": "offline", "id": "mine"}
    written = recipe(tmp_path, train_iters=1, wandb=wandb)
    (tmp_path / "rows.jsonl").rename(secret)
    written["data"]["sources"] = ["${env:WHERE}"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written))
    SFTTrainer(get_config(tmp_path / "recipe.yaml")).train()
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-mine.wandb")
    config = {
        item.key: json.loads(item.value_json)
        for record in records(file)
        if record.HasField("run")
        for item in record.run.config.update
    }
    assert config["train_iters"] == 1 and "${env:WHERE}" in json.dumps(config["data"])
    assert b"quite-secret" not in file.read_bytes()


def test_disabled_needs_neither_package_nor_network(tmp_path):
    off = {"enable": True, "mode": "disabled"}
    trainer(recipe(tmp_path, train_iters=1, wandb=off)).train()
    assert not (tmp_path / "run" / "wandb").exists()


def test_nobody_logged_in_is_said_before_anything_is_written(tmp_path):
    pytest.importorskip("wandb")
    with pytest.raises(RecipeError, match=r"wandb: No API key .* Or write wandb\.mode: offline"):
        trainer(recipe(tmp_path, train_iters=1, wandb={"enable": True, "mode": "online"})).train()
    assert not (tmp_path / "run").exists()
    check_login(WandbConfig(enable=True, mode="offline"))
