"""Traces and memory profiles lie where the recipe says, and are of the updates that it says."""

import gzip
import json

import jax
import pytest

from tests.runs import recipe, trainer


def updates_in(folder):
    """How often the step was called in the one trace of a folder; a call may stand inside another
    of the same name."""
    (file,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    calls = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("name") == "PjitFunction(step)"
    )
    count, end = 0, 0.0
    for begin, own_end in calls:
        count, end = count + (begin >= end), max(end, own_end)
    return count


def calls_in_xplane(folder):
    """Calls of the step in the file that XProf reads, where the other is for Perfetto."""
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = (event for plane in planes for line in plane.lines for event in line.events)
    return sum(event.name == "PjitFunction(step)" for event in events)


@pytest.mark.covers("profile.start_step", "profile.num_steps")
@pytest.mark.parametrize(
    ("window", "traced"),
    [({"start_step": 2, "num_steps": 2}, 2), ({"start_step": 3, "num_steps": 9}, 1)],
)
def test_a_trace_has_its_updates(tmp_path, window, traced):
    trainer(recipe(tmp_path, profile=window)).train()
    assert updates_in(tmp_path / "run" / "profile") == traced
    assert calls_in_xplane(tmp_path / "run" / "profile") >= traced


@pytest.mark.covers("profile.dir")
def test_a_trace_has_a_folder_and_ends_with_a_run_that_fails(tmp_path):
    class Stop(Exception):
        pass

    class Stopping:
        def on_step_end(self, args, state, control):
            raise Stop

    traced = {"start_step": 0, "dir": str(tmp_path / "traces")}
    run = trainer(recipe(tmp_path, profile=traced, mem_profiler="e2e"))
    run.add_callback(Stopping())
    with pytest.raises(Stop):
        run.train()
    assert updates_in(tmp_path / "traces") == 1
    assert (tmp_path / "run" / "mem-prof" / "end_rank_0.prof").is_file()


def test_a_run_that_resumes_behind_the_trace_makes_none(tmp_path):
    state = {"output_dir": str(tmp_path / "state"), "save_every_n_steps": 1, "auto_resume": True}
    written = recipe(tmp_path, train_iters=3) | {"checkpoint": state}
    trainer(written | {"exit_iteration": 2}).train()
    trainer(written | {"profile": {"start_step": 0, "num_steps": 2}}).train()
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.covers("mem_profiler")
@pytest.mark.parametrize(
    ("when", "found"),
    [("step", ["step_1_rank_0", "step_2_rank_0", "step_4_rank_0"]), ("e2e", ["end_rank_0"])],
)
def test_memory_profiles_lie_in_the_run(tmp_path, when, found):
    """Trap A42."""
    logs = {"output_dir": "/dev/null"}
    trainer(recipe(tmp_path, mem_profiler=when, train_log_iter_interval=2, logger=logs)).train()
    folder = tmp_path / "run" / "mem-prof"
    assert sorted(file.stem for file in folder.iterdir()) == found
    for file in folder.iterdir():  # a gzipped pprof profile with buffers of devices
        assert b"buffer" in gzip.decompress(file.read_bytes())


@pytest.mark.covers("mem_profiler_dir")
def test_memory_profiles_have_a_folder(tmp_path):
    there = {"mem_profiler_dir": str(tmp_path / "memory"), "mem_profiler": "e2e"}
    trainer(recipe(tmp_path, train_iters=1, **there)).train()
    assert (tmp_path / "memory" / "end_rank_0.prof").is_file()
