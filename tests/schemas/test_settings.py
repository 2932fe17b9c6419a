"""One config, four ways in."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from schemas import configs
from schemas.configs import DecoderTrainConfig, DownloadConfig, JobConfig, QueryConfig, SqlConfig
from schemas.errors import UsageError
from schemas.settings import check_environment, load, variables

CONFIGS = [
    c
    for c in vars(configs).values()
    if inspect.isclass(c) and issubclass(c, BaseModel) and c.__module__ == "schemas.configs" and c is not JobConfig
]


def download(*argv: str, **environ: str) -> DownloadConfig:
    return load(DownloadConfig, argv, environ, "clipmill download")[0]


def yaml(tmp_path: Path, text: str) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return str(file)


def test_defaults_then_yaml_then_environment_then_flags(tmp_path: Path) -> None:
    file = yaml(tmp_path, "image_size: 11\nquality: 12\nretries: 13\n")
    found = download("--config", file, "--retries", "33", CLIPMILL_QUALITY="22", CLIPMILL_RETRIES="23")
    assert (found.image_size, found.quality, found.retries) == (11, 22, 33)
    assert found.timeout == DownloadConfig().timeout


@given(st.sets(st.sampled_from(["yaml", "environ", "flag"])))
def test_the_last_of_those_given_wins(given_by: set[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        argv = ["--config", yaml(Path(folder), "retries: 7" if "yaml" in given_by else "")]
        argv += ["--retries", "9"] if "flag" in given_by else []
        environ = {"CLIPMILL_RETRIES": "8"} if "environ" in given_by else {}
        expected = 9 if "flag" in given_by else 8 if "environ" in given_by else 7 if "yaml" in given_by else 2
        assert download(*argv, **environ).retries == expected


def test_lists_as_a_shell_gives_them() -> None:
    assert download("--pairs", "a.csv", "b.csv", "--retries", "1").pairs == ("a.csv", "b.csv")
    assert download(CLIPMILL_PAIRS="a.csv,b.csv").pairs == ("a.csv", "b.csv")
    assert download(CLIPMILL_PAIRS='["a,b.csv", "c.csv"]').pairs == ("a,b.csv", "c.csv")


@pytest.mark.parametrize(
    "argv", [["--allow-hosts", "a:1,b", "c"], ["--allow-hosts", "a:1", "b", "c"], ["--allow-hosts", " a:1 , b,c,"]]
)
def test_comma_lists(argv: list[str]) -> None:
    assert download(*argv).allow_hosts == ("a:1", "b", "c")


def test_lists_in_yaml(tmp_path: Path) -> None:
    file = yaml(tmp_path, "pairs: [a.csv, b.csv]\nallow_hosts: [x, 'y:1']\n")
    assert download("--config", file).pairs == ("a.csv", "b.csv")
    assert download("--config", file).allow_hosts == ("x", "y:1")
    single = yaml(tmp_path, "pairs: a.csv\nallow_hosts: x,y:1\n")
    assert download("--config", single).pairs == ("a.csv",)
    assert download("--config", single).allow_hosts == ("x", "y:1")


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        (["--upscale"], {}, True),
        (["--no-upscale"], {"CLIPMILL_UPSCALE": "true"}, False),
        ([], {"CLIPMILL_UPSCALE": "1"}, True),
        ([], {}, False),
    ],
)
def test_switches(argv: list[str], environ: dict[str, str], expected: bool) -> None:
    assert download(*argv, **environ).upscale is expected


def test_nested_fields_are_dotted(tmp_path: Path) -> None:
    file = yaml(tmp_path, "network: {width: 32, layers: 3, trunk_width: 99}\n")
    found, _ = load(
        DecoderTrainConfig,
        ["--config", file, "--network.layers", "7"],
        {"CLIPMILL_NETWORK__WIDTH": "64"},
        "clipmill train decoder",
    )
    assert (found.network.width, found.network.layers, found.network.trunk_width) == (64, 7, 99)
    assert found.network.patch_size == DecoderTrainConfig().network.patch_size


def test_one_letter_flags() -> None:
    assert load(QueryConfig, ["--text", "x", "-k", "3"], {}, "q")[0].k == 3
    assert load(QueryConfig, ["--text", "x", "--k", "4"], {}, "q")[0].k == 4


def test_an_argument_without_its_flag() -> None:
    for argv in (["SELECT 1", "--limit", "3"], ["--limit", "3", "SELECT 1"], ["--query", "SELECT 1", "--limit", "3"]):
        config, _ = load(SqlConfig, argv, {}, "q")
        assert (config.query, config.limit) == ("SELECT 1", 3)
    assert load(SqlConfig, ["--limit", "3"], {}, "q")[0].query is None
    with pytest.raises(UsageError, match="unrecognized arguments: from"):
        load(SqlConfig, ["SELECT 1", "from", "t"], {}, "q")


def test_json_is_seen() -> None:
    assert load(DownloadConfig, ["--json"], {}, "d")[1] is True
    assert load(DownloadConfig, [], {}, "d")[1] is False


@pytest.mark.parametrize(
    ("argv", "environ", "text", "words"),
    [
        (["--no-such-flag", "1"], {}, "", ["--no-such-flag"]),
        (["--retrie", "1"], {}, "", ["--retrie"]),  # no abbreviations: they change meaning with the next field
        (["--retries", "-1"], {}, "", ["retries", "-1"]),
        (["--retries", "two"], {}, "", ["retries", "two"]),
        (["--format", "bmp"], {}, "", ["format", "'jpg', 'png' or 'webp'"]),
        (["--retries"], {}, "", ["--retries"]),
        (["extra"], {}, "", ["extra"]),
        ([], {"CLIPMILL_TIMEOUT": "soon"}, "", ["timeout", "soon"]),
        ([], {"CLIPMILL_PAIRS": "[a"}, "", ["CLIPMILL_PAIRS"]),
        ([], {}, "imagesize: 3", ["'imagesize'", "did you mean 'image_size'"]),
        ([], {}, "image_size: [1]", ["image_size"]),
        ([], {}, "- a\n- b", ["not a mapping", "list"]),
        ([], {}, "a: [", ["cannot read"]),
    ],
)
def test_refused_with_the_name_of_what_is_wrong(
    argv: list[str], environ: dict[str, str], text: str, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        download("--config", yaml(tmp_path, text), *argv, **environ)
    for word in words:
        assert word in str(caught.value)


def test_unknown_nested_keys_are_suggested(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'network\.widht', did you mean 'network\.width'"):
        load(DecoderTrainConfig, ["--config", yaml(tmp_path, "network: {widht: 3}")], {}, "t")
    with pytest.raises(UsageError, match="network is not a mapping"):
        load(DecoderTrainConfig, ["--config", yaml(tmp_path, "network: 3"), "--network.width", "4"], {}, "t")


def test_a_missing_config_file() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml"):
        download("--config", "nowhere.yaml")


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_help_lists_every_field_with_its_default(cls: type[BaseModel], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(cls, ["--help"], {}, "clipmill x")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert {"--config", "--json"} <= set(text.replace(",", " ").split())

    def check(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
                check(field.annotation, f"{prefix}{name}.")
                continue
            flag = f"--{prefix}{name}".replace("_", "-")
            assert flag in text, flag
            assert field.description, f"{flag} has no description"
            if isinstance(field.default, (int, float, str)) and field.default != "":
                assert f"(default: {field.default})" in text, flag

    check(cls, "")


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_variables_are_those_that_are_read(cls: type[BaseModel]) -> None:
    assert len(variables(cls)) >= len(cls.model_fields)
    assert all(name == name.upper() and name.startswith("CLIPMILL_") for name in variables(cls))


def test_unknown_variables_are_refused_with_a_suggestion() -> None:
    known = variables(DownloadConfig) | variables(DecoderTrainConfig)
    check_environment({"CLIPMILL_RETRIES": "1", "CLIPMILL_NETWORK__WIDTH": "2", "HOME": "/", "CLIPMILLX": ""}, known)
    with pytest.raises(UsageError) as caught:
        check_environment({"CLIPMILL_RETRYS": "1", "CLIPMILL_QQQQQQ": "2", "CLIPMILL_RETRIES": "3"}, known)
    assert "CLIPMILL_RETRYS, did you mean CLIPMILL_RETRY?" in caught.value.actual
    assert "CLIPMILL_QQQQQQ" in caught.value.actual
    assert caught.value.exit_status == 2


def test_png_quality_is_a_level() -> None:
    assert download("--format", "png").quality == 6
    assert download("--format", "png", "--quality", "3").quality == 3
    assert download().quality == 95
    with pytest.raises(UsageError, match="0 to 9"):
        download("--format", "png", "--quality", "95")
