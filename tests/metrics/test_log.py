"""Which process writes what into its log file and onto the terminal."""

import pytest

from jaxtrain.metrics.log import close_log, log, open_log, screen
from jaxtrain.recipe.logger import LoggerConfig


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("JAXTRAIN_LOG_LEVEL", "AT_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    yield
    close_log()


@pytest.mark.covers("logger.level")
@pytest.mark.parametrize(
    ("keys", "variables", "shown"),
    [
        ({}, {}, ["WARNING", "ERROR"]),
        ({"level": "ERROR"}, {}, ["ERROR"]),
        ({"level": "ERROR"}, {"AT_LOG_LEVEL": "info"}, ["ERROR"]),
        ({}, {"AT_LOG_LEVEL": "info"}, ["INFO", "WARNING", "ERROR"]),
        ({}, {"AT_LOG_LEVEL": "INFO", "JAXTRAIN_LOG_LEVEL": "ERROR"}, ["ERROR"]),
        ({"level": "DEBUG"}, {}, ["DEBUG", "INFO", "WARNING", "ERROR"]),
    ],
)
def test_the_terminal_has_a_level_and_the_file_has_all(
    tmp_path, monkeypatch, capsys, keys, variables, shown
):
    for name, level in variables.items():
        monkeypatch.setenv(name, level)
    open_log(tmp_path, LoggerConfig(**keys), process=0)
    for level in ("debug", "info", "warning", "error"):
        getattr(log, level)("said")
    screen.error("shown by the console")
    levels = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert levels == shown
    file = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "INFO said" in file and "ERROR shown by the console" in file


@pytest.mark.covers("logger.print_output_ranks", "logger.file_output_ranks")
@pytest.mark.parametrize(
    ("keys", "process", "prints", "has_file"),
    [
        ({}, 0, True, True),
        ({}, 1, False, True),
        ({"print_output_ranks": [1, 2], "file_output_ranks": [0]}, 0, False, True),
        ({"print_output_ranks": [1, 2], "file_output_ranks": [0]}, 1, True, False),
        ({"print_output_ranks": "*", "file_output_ranks": []}, 7, True, False),
    ],
)
def test_ranks_are_process_numbers(tmp_path, capsys, keys, process, prints, has_file):
    open_log(tmp_path, LoggerConfig.model_validate(keys), process=process)
    log.error("said")
    assert ("said" in capsys.readouterr().err) == prints
    assert (tmp_path / "logs" / f"rank_{process}.log").is_file() == has_file
