"""Which checkpoints load, and what the refused ones are told: code in a pickle, other shapes, the other GELU."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.models.clip import build_clip
from pipeline.models.loading import _check_gelu, load
from pipeline.models.weights import weights_sha256
from schemas.errors import UsageError
from tests.pipeline.models.clips import clip_folder
from tests.pipeline.models.test_clip import TINY


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip knows TINY by name."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)


def network(**changes: Any) -> nn.Module:
    torch.manual_seed(3)
    return build_clip(TINY | changes)


def vision(**changes: Any) -> dict[str, Any]:
    return {"vision_cfg": TINY["vision_cfg"] | changes}


def text(**changes: Any) -> dict[str, Any]:
    return {"text_cfg": TINY["text_cfg"] | changes}


def write(file: Path, module: nn.Module) -> Path:
    state = module.state_dict()
    if file.suffix == ".safetensors":
        save_file(state, file)
    elif file.suffix == ".pth":  # as open_clip's training saves it, from several GPUs
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ".pth"])
def test_checkpoints_of_every_kind_are_the_same_encoder(tmp_path: Path, suffix: str) -> None:
    module = network()
    loaded = load(f"tiny:{write(tmp_path / f'weights{suffix}', module)}")
    assert loaded.card().weights_sha256 == weights_sha256(module)
    assert (loaded.name, loaded.card("mine").model) == ("tiny", "mine")
    assert loaded.pretrained == str(tmp_path / f"weights{suffix}")


class Attack:
    """Runs a command when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".ckpt"])
@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, suffix: str, old_format: bool) -> None:
    ran, file = tmp_path / "ran", tmp_path / f"evil{suffix}"
    state = network().state_dict() | {"attack": Attack(ran)}
    if old_format:
        file.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, file)
    specs = [f"tiny:{file}"]
    if suffix in (".bin", ".pth"):  # what open_clip picks out of a folder
        config = {"model_cfg": TINY, "preprocess_cfg": {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        specs.append(f"local-dir:{tmp_path}")
    for spec in specs:
        with pytest.raises(UsageError) as caught:
            load(spec)
        assert not ran.exists()
        assert "plain file of tensors" in str(caught.value) or "readable checkpoint" in str(caught.value)
        assert "weights_only=False" not in str(caught.value)  # torch's own advice
    if not old_format:
        torch.load(file, weights_only=False)
        assert ran.exists()  # it would have run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embed_dim": 24}, ["2 reshaped", "text_projection [16, 24] for [16, 16]", "visual.proj"]),
        (vision(layers=2), ["12 unknown", "visual.transformer.resblocks.1"]),
        (text(layers=1), ["12 missing", "transformer.resblocks.1.attn.in_proj_bias"]),
        (text(width=24), ["reshaped", "[24] for [16]"]),
        (vision(patch_size=4), ["visual.conv1.weight [16, 3, 4, 4] for [16, 3, 8, 8]"]),
        # These two open_clip would stretch without a word.
        (vision(image_size=24), ["visual.positional_embedding [10, 16] for [5, 16]"]),
        (text(context_length=20), ["1 reshaped (positional_embedding [20, 16] for [12, 16]"]),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_architecture_is_refused_with_the_tensors_that_tell(
    tmp_path: Path, changes: dict[str, Any], said: list[str], suffix: str
) -> None:
    file = write(tmp_path / f"other{suffix}", network(**changes))
    with pytest.raises(UsageError, match="another architecture") as caught:
        load(f"tiny:{file}")
    for part in said:
        assert part in caught.value.actual
    assert "list_models" in caught.value.remedy


def test_folders_are_compared_too(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "tiny")
    assert load(f"local-dir:{folder}").card().image_size == 16
    save_file(network(embed_dim=24).state_dict(), folder / "open_clip_model.safetensors")
    with pytest.raises(UsageError, match="another architecture"):
        load(f"local-dir:{folder}")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot load"):  # and not random weights
        load(f"local-dir:{folder}")


def test_older_names_of_a_text_tower_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY | {"custom_text": True})
    assert hasattr(load(f"tiny:{write(tmp_path / 'old.safetensors', network())}").model, "text")
    longer = network(text_cfg=TINY["text_cfg"] | {"context_length": 20})
    with pytest.raises(UsageError, match="positional_embedding"):
        load(f"tiny:{write(tmp_path / 'longer.safetensors', longer)}")


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt", "broken.bin"])
@pytest.mark.parametrize("keep", [0, 50, 5000])
def test_damaged_files_are_refused(tmp_path: Path, name: str, keep: int) -> None:
    file = write(tmp_path / name, network())
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"broken\."):
        load(f"tiny:{file}")


def test_inputs_that_are_no_square_are_refused(tmp_path: Path) -> None:
    config = TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": [16, 24]}}
    with pytest.raises(UsageError, match="16 x 24"):
        load(f"local-dir:{clip_folder(tmp_path / 'oblong', config)}").card()
    with pytest.raises(UsageError, match="fill colour 127"):
        load(f"local-dir:{clip_folder(tmp_path / 'grey', resize_mode='longest', fill_color=127)}").card()


@pytest.mark.parametrize("spec", ["tiny", "tiny:no-such-tag", "no-such-model:laion", "local-dir:/no/folder", "tiny:"])
def test_what_there_is_not(spec: str) -> None:
    with pytest.raises(UsageError):
        load(spec)


# ---- QuickGELU -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tag", "right"),
    [
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu:openai"),
        ("ViT-L-14", "dfn2b", "ViT-L-14-quickgelu:dfn2b"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "ViT-B-32:laion2b_s34b_b79k"),
    ],
)
def test_the_wrong_gelu_is_refused_before_anything_is_fetched(model: str, tag: str, right: str) -> None:
    with pytest.raises(UsageError, match="activation") as caught:
        load(f"{model}:{tag}")
    assert right in caught.value.remedy


def test_of_all_tags_those_are_refused_whose_sibling_has_their_gelu() -> None:
    refused = 0
    for model, tag in open_clip.list_pretrained():
        trained = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)
        has = open_clip.get_model_config(model).get("quick_gelu", False)
        sibling = model.removesuffix("-quickgelu") if "quickgelu" in model else f"{model}-quickgelu"
        if trained != has and sibling in open_clip.list_models():
            with pytest.raises(UsageError, match="activation"):
                _check_gelu(model, tag)
            refused += 1
        else:
            _check_gelu(model, tag)
    assert refused > 10
