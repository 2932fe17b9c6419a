"""Every example config fits its job, and says at its head what a lab note says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.download.lists.sources import find
from schemas import configs
from schemas.settings import load

CONF = Path(__file__).resolve().parents[1] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))


def config_class(file: Path) -> type[configs.JobConfig]:
    """train-clip.yaml -> ClipTrainConfig, embed.yaml -> EmbedConfig."""
    first, _, kind = file.stem.partition("-")
    found = getattr(configs, f"{kind.capitalize()}TrainConfig" if first == "train" else f"{first.capitalize()}Config")
    assert issubclass(found, configs.JobConfig)
    return found


def names(file: Path) -> str:
    return str(file.relative_to(CONF))


def test_there_is_one_for_each_job_of_the_chain() -> None:
    for folder in (CONF, CONF / "emoji"):
        here = {file.stem for file in folder.glob("*.yaml")}
        assert here == {"download", "embed", "index", "train-clip", "train-prior", "train-decoder", "generate"}


@pytest.mark.parametrize("file", FILES, ids=names)
def test_fits_its_job(file: Path) -> None:
    config, _ = load(config_class(file), ["--config", str(file)], {}, file.stem)
    assert config.workspace.startswith("./ws")


@pytest.mark.parametrize("file", FILES, ids=names)
def test_head_is_a_lab_note(file: Path) -> None:
    head = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8"))
    assert head, "no comment at the head"
    for word in ("Command:", "Hardware:", "Time:", "Expected:"):
        assert f"# {word}" in head[0]
    job = file.stem.replace("-", " ")
    assert f"clipmill {job} --config conf/{file.relative_to(CONF).as_posix()}" in head[0]


@pytest.mark.parametrize("file", FILES, ids=names)
def test_no_key_is_given_twice(file: Path) -> None:
    keys = re.findall(r"^(\w+):", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(keys) == len(set(keys))


def test_files_named_in_configs_are_there() -> None:
    for file in FILES:
        for path in re.findall(r"\bconf/[\w./-]+\.(?:yaml|json|txt)", file.read_text(encoding="utf-8")):
            assert (CONF.parent / path).is_file(), f"{file}: {path}"


def test_prompts_of_the_emoji_chain() -> None:
    (prompts,) = find([str(CONF / "emoji" / "prompts.txt")])
    lines = prompts.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 10
