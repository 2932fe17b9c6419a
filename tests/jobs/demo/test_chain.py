"""A very small demo from end to end, then again: nothing is repeated, nothing doubled."""

import json
import urllib.request
from pathlib import Path

import pytest

from jobs.demo import chain, settings
from jobs.demo.server import FileServer
from pipeline.engine import Engine
from pipeline.workspace import Workspace
from schemas.configs import DemoConfig
from schemas.errors import ClipmillError, UsageError
from schemas.tables import TABLES


def test_server_serves_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    with FileServer(tmp_path, 0) as server:
        url = f"http://127.0.0.1:{server.port}/a.png"
        with urllib.request.urlopen(url) as response:
            assert response.read() == b"picture"
        with pytest.raises(ClipmillError, match="port"), FileServer(tmp_path, server.port):
            pass


@pytest.mark.slow
def test_demo_end_to_end_and_again(tmp_path: Path, engine: Engine) -> None:
    config = DemoConfig(folder=str(tmp_path / "demo"), pairs=600, effort=0.004, prompts=2, candidates=2)
    result = chain.run(config, engine)
    assert result["counts"] == {"pairs": 600, "images": 600, "embeddings": 600, "candidates": 16}
    assert set(result["metrics"]["generation"]) == {"single", "trained", "held_out_pair", "held_out_shape"}
    saved = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert saved["workspace"] == str(tmp_path / "demo" / "ws")
    page = (tmp_path / "demo" / "report" / "index.html").read_text()
    assert page.count("data:image/png") > 40
    assert "http://" not in page  # nothing is loaded from elsewhere

    workspace = Workspace(saved["workspace"])
    versions = {name: workspace.table(name).version() for name in TABLES}
    again = chain.run(config, engine)
    assert {name: workspace.table(name).version() for name in TABLES} == versions
    assert again["metrics"] == json.loads(json.dumps(result["metrics"]))

    with pytest.raises(UsageError, match="other settings"):
        chain.run(config.model_copy(update={"pairs": 700}), engine)


def test_a_slow_machine_shortens_prior_and_decoder_and_nothing_else() -> None:
    config = DemoConfig()
    fast, slow = (settings.affordable(config, step, 400.0) for step in (0.1, 0.4))
    assert fast == 1.0
    assert settings.affordable(config, 0.4, -50.0) <= slow < 1.0  # never less than a least share
    assert settings.affordable(config, 0.0, 400.0) == 1.0  # not measured: the plan
    full, short = (settings.decoder(config, "ws", pace).model_dump(exclude={"steps"}) for pace in (1.0, 0.5))
    assert full == short
    assert settings.decoder(config, "ws", 0.5).steps * 2 == settings.decoder(config, "ws", 1.0).steps
