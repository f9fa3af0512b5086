"""`jaxtrain check --online` against a server that answers as the hub does."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

ANSWERS = {
    "/api/models/open/model/auth-check": (200, ""),
    "/api/datasets/open/rows/auth-check": (200, ""),
    "/api/datasets/gated/rows/auth-check": (403, "GatedRepo"),
    "/api/models/broken/model/auth-check": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.endswith("/auth-check"):  # the library asks other things on its own account
            self.server.asked.append((self.path, self.headers.get("Authorization")))
        status, code = ANSWERS.get(self.path, (404, "RepoNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *message):
        pass


@pytest.fixture
def hub():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def check(folder, recipe, endpoint, **environment):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain", "check", str(file), "--online"],
        cwd=folder, capture_output=True, text=True, env=os.environ | settings | environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.splitlines()


def address(server):
    return f"http://127.0.0.1:{server.server_port}"


def test_what_the_hub_gives_is_told(tmp_path, hub):
    (tmp_path / "own.jsonl").write_text("{}\n")
    recipe = {
        "model": {"name_or_path": "open/model"},
        "data": {"sources": ["open/rows:train[:5]", "own.jsonl"]},
    }
    code, out, said = check(tmp_path, recipe, address(hub), HF_TOKEN="hf_hidden")
    assert (code, said) == (0, [])
    found = f"online     model open/model, dataset open/rows: available from {address(hub)}"
    assert found in out.splitlines(), out
    assert hub.asked == [
        ("/api/models/open/model/auth-check", "Bearer hf_hidden"),
        ("/api/datasets/open/rows/auth-check", "Bearer hf_hidden"),
    ]
    assert "hf_hidden" not in out


def test_each_repository_out_of_reach_is_said_with_its_line_and_reason(tmp_path, hub):
    recipe = {
        "data": {
            "eval_sources": ["no such/name at all"],
            "sources": ["gated/rows", "open/rows", "missing/rows"],
        },
        "eval_interval": 1,
        "model": {"name_or_path": "broken/model"},
        "tokenizer": {"name_or_path": "missing/words"},
    }
    url = address(hub)
    code, _, said = check(tmp_path, recipe, url, HF_TOKEN="hf_hidden")
    file = tmp_path / "recipe.yaml"
    missing = f"is not on {url}, or is private and HF_TOKEN has no access to it"
    assert (code, said[:-2]) == (2, [
        f"{file}:3: data.eval_sources.0.name_or_path: 'no such/name at all' is neither a path on this "
        "machine nor the name of a repository",
        f"{file}:5: data.sources.0.name_or_path: 'gated/rows' is gated: accept its terms at "
        f"{url}/datasets/gated/rows, and set HF_TOKEN to a token that did",
        f"{file}:7: data.sources.2.name_or_path: 'missing/rows' {missing}",
        f"{file}:10: model.name_or_path: 'broken/model' cannot be downloaded: {url} answers 500",
        f"{file}:12: tokenizer.name_or_path: 'missing/words' {missing}",
    ])  # fmt: skip
    assert said[-2] == "5 errors in recipe.yaml; nothing was started"
    assert "hf_hidden" not in "".join(said)


@pytest.mark.parametrize(
    ("offline", "reason"),
    [
        ("0", "cannot be reached at http://127.0.0.1:9: ConnectError"),
        ("1", "cannot be checked: HF_HUB_OFFLINE is set"),
    ],
)
def test_a_hub_out_of_reach_is_no_fault_of_the_name(tmp_path, offline, reason):
    recipe = {"model": {"name_or_path": "a/b"}, "data": {"sources": [{"type": "synthetic"}]}}
    code, _, said = check(tmp_path, recipe, "http://127.0.0.1:9", HF_HUB_OFFLINE=offline)
    assert (code, said[0]) == (
        2, f"{tmp_path}/recipe.yaml:5: model.name_or_path: 'a/b' {reason}",
    )  # fmt: skip


def test_without_the_flag_nobody_is_asked(tmp_path, hub):
    recipe = {"model": {"name_or_path": "open/model"}, "data": {"sources": ["missing/rows"]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain", "check", "recipe.yaml"],
        cwd=tmp_path, env=os.environ | {"HF_ENDPOINT": address(hub)},
    )  # fmt: skip
    assert done.returncode == 0 and hub.asked == []
