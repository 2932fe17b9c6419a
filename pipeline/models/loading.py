"""open_clip models by name and tag, hub id, folder or checkpoint; and why one is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.weights import weights_sha256
from schemas.cards import EncoderCard
from schemas.errors import UsageError

_GRAMMAR = "MODEL:TAG, MODEL:PATH, hf-hub:ID, local-dir:PATH, or the name of a CLIP trained in this workspace"
_HUB, _FOLDER = "hf-hub:", "local-dir:"
_GELU = "-quickgelu"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Loaded:
    """A model in float32 on the CPU, with the preprocessing and the tokenizer that belong to it."""

    name: str
    pretrained: str
    model: nn.Module
    preprocess: Any
    tokenizer: Any

    def card(self, name: str | None = None) -> EncoderCard:
        """The card of what is loaded.

        Raises:
            UsageError: its input is not a square, or padded in a colour other than black.
        """
        model: Any = self.model
        config = model.visual.preprocess_cfg
        size = model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if height != width or config.get("fill_color", 0) != 0:
            raise UsageError(
                f"the encoder {self.name} cannot be used",
                expected="a square input, padded with black where it is padded",
                actual=f"{height} x {width} pixels, fill colour {config.get('fill_color', 0)}",
                remedy="take another model",
            )
        tower = model if hasattr(model, "text_projection") else model.text
        return EncoderCard(
            model=name or self.name,
            pretrained=self.pretrained,
            weights_sha256=weights_sha256(self.model),
            dim=_dim(model, tower),
            image_size=int(height),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            resize_mode=config["resize_mode"],
            context_length=int(self.tokenizer.context_length),
            dtype="float32",
            quick_gelu=any(type(m).__name__ == "QuickGELU" for m in self.model.modules()),
        )


def load(spec: str) -> Loaded:
    """``MODEL:TAG``, ``MODEL:PATH``, ``hf-hub:ID`` or ``local-dir:PATH`` -> the model with its weights.

    Checkpoints are safetensors, or what ``torch.load(weights_only=True)`` reads.

    Raises:
        UsageError: no such model, tag or file; no weights; a checkpoint with code in it, or of another architecture;
            a tag whose weights were trained with the other GELU.
    """
    import open_clip

    model, pretrained = _split(spec)
    if pretrained is None and ":" not in model:
        raise UsageError(
            f"the encoder {model} has no weights",
            expected=_GRAMMAR,
            remedy=f"tags of it: {', '.join(open_clip.list_pretrained_tags_by_model(model)) or 'none'}",
        )
    _check_gelu(model, pretrained)
    file = _checkpoint(model, pretrained)
    shapes = _shapes(file) if file else {}
    try:
        network = open_clip.create_model(model, pretrained=pretrained, weights_only=True, require_pretrained=True)
        config = open_clip.transform.PreprocessCfg(**network.visual.preprocess_cfg)
        preprocess = open_clip.transform.image_transform_v2(config, is_train=False)
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as exc:  # a file or a hub can make open_clip fail in any way
        if file is not None:
            _check_shapes(file, shapes, _blank(model))
        if isinstance(exc, pickle.UnpicklingError):
            raise _refused_pickle(spec, exc) from exc
        raise UsageError(
            f"cannot load the encoder {spec}",
            expected=_GRAMMAR,
            actual=" ".join(str(exc).split())[:400] or type(exc).__name__,
            remedy="open_clip.list_pretrained() lists models and tags; weights must be cached or within reach",
        ) from exc
    if file is not None:
        _check_positions(file, shapes, network)
    return Loaded(model, pretrained or spec, network, preprocess, tokenizer)


def read_model_config(model: str) -> dict[str, Any]:
    """{"model_cfg", "preprocess_cfg"} of an open_clip model name, or of a JSON file in open_clip's layout.

    Written as ``open_clip_config.json`` beside ``open_clip_model.safetensors``, it makes a folder that
    ``local-dir:`` loads.

    Raises:
        UsageError: neither a name nor such a file.
    """
    import open_clip

    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        loaded: dict[str, Any] = json.loads(path.read_text())
        network = loaded.get("model_cfg", loaded)
        preprocess = loaded.get("preprocess_cfg", {})
    else:
        network, preprocess = open_clip.get_model_config(model), {}
    if not isinstance(network, dict) or "vision_cfg" not in network:
        raise UsageError(
            f"open_clip knows no model {model!r}",
            expected="a model name, or the path of a JSON model config in open_clip's layout",
        )
    defaults = {
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": dict(network), "preprocess_cfg": defaults | preprocess}


def _split(spec: str) -> tuple[str, str | None]:
    """("ViT-B-32", "openai") of "ViT-B/32:openai"; hub ids and folders stay whole."""
    if spec.startswith((_HUB, _FOLDER)):
        return spec, None
    model, _, pretrained = spec.partition(":")
    return model.replace("/", "-"), pretrained or None


def _dim(model: Any, tower: Any) -> int:
    """D of the vectors."""
    projection = getattr(tower, "text_projection", None)
    if projection is None:
        return int(getattr(model.visual, "output_dim", None) or tower.output_dim)
    return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])


def _check_gelu(model: str, tag: str | None) -> None:
    """open_clip only warns where a tag's weights were trained with QuickGELU and the model has GELU, or the reverse.

    Raises:
        UsageError: they differ, and open_clip has the same model with the other one.
    """
    from open_clip import get_model_config, get_pretrained_cfg

    other = model.removesuffix(_GELU) if model.endswith(_GELU) else model + _GELU
    if tag is None or (network := get_model_config(other)) is None:
        return
    mine, others = get_pretrained_cfg(model, tag), get_pretrained_cfg(other, tag)
    wanted = bool((mine or others).get("quick_gelu")) if mine or others else None
    if wanted is not None and wanted == bool(network.get("quick_gelu")):
        names = {True: "QuickGELU", False: "GELU"}
        raise UsageError(
            f"the weights {tag} were not trained with the activation of {model}",
            expected=names[wanted],
            actual=names[not wanted],
            remedy=f"--encoder {other}:{tag}",
        )


# ---- checkpoints -----------------------------------------------------------------------------------


def _checkpoint(model: str, pretrained: str | None) -> Path | None:
    """The file that will be loaded, where it is on this machine and has no tag's name."""
    from open_clip import get_pretrained_cfg
    from open_clip.factory import _find_checkpoint_in_dir

    if model.startswith(_FOLDER):
        found = _find_checkpoint_in_dir(Path(model.removeprefix(_FOLDER)))
        return Path(found) if found else None
    if pretrained is None or get_pretrained_cfg(model, pretrained) or not Path(pretrained).is_file():
        return None
    return Path(pretrained)


def _shapes(file: Path) -> Shapes:
    """Names and shapes of a checkpoint's tensors, without the tensors.

    Raises:
        UsageError: it is damaged, or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        if file.suffix in (".npz", ".npy"):
            return {}  # big_vision's, in its own names
        state = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as exc:
        raise _refused_pickle(str(file), exc) from exc
    except Exception as exc:  # safetensors, zipfile and torch raise their own
        if "TorchScript" in str(exc):
            raise _refused_pickle(str(file), exc) from exc
        raise UsageError(
            f"{file} is no readable checkpoint",
            expected="safetensors, or a .pt that torch.load(weights_only=True) reads",
            actual=" ".join(str(exc).split())[:300],
            remedy="copy it again, or save it again as safetensors",
        ) from exc
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    return {k.removeprefix("module."): tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)}


def _refused_pickle(what: str, exc: Exception) -> UsageError:
    reasons = (line.strip() for line in str(exc).splitlines() if "Unsupported" in line)
    said = "a TorchScript archive" if "TorchScript" in str(exc) else next(reasons, "something else")
    return UsageError(
        f"the checkpoint {what} is no plain file of tensors, and is not loaded",
        expected="safetensors, or a .pt that torch.load(weights_only=True) reads",
        actual=said[:300],
        remedy="a pickle can run any code: save its state_dict as safetensors where you trust it",
    )


def _blank(model: str) -> nn.Module | None:
    """The same network without weights; None if even that fails."""
    import open_clip

    try:
        network: nn.Module = open_clip.create_model(model, load_weights=False, pretrained_text=False)
        return network
    except Exception:  # the first error is the one to report
        return None


def _check_shapes(file: Path, shapes: Shapes, network: nn.Module | None) -> None:
    """Raises UsageError where the checkpoint is of another architecture, with the tensors that tell."""
    if network is None or not shapes:
        return
    here, there = _of(network), _renamed(shapes, network)
    parts = [
        (sorted(here.keys() - there.keys()), "missing"),
        (sorted(there.keys() - here.keys()), "unknown"),
        ([f"{n} {list(there[n])} for {list(here[n])}" for n in sorted(here) if _differ(n, here, there)], "reshaped"),
    ]
    said = [f"{len(names)} {word} ({', '.join([*names[:3], '...'][: len(names)])})" for names, word in parts if names]
    if said:
        raise _other_architecture(file, "; ".join(said))


def _check_positions(file: Path, shapes: Shapes, network: nn.Module) -> None:
    """Raises UsageError where open_clip has stretched the positions of another image size or context length.

    It does so without a word: weights of 336 pixels run at 224, and are another, worse encoder.
    """
    here, there = _of(network), _renamed(shapes, network)
    names = [n for n in here if n.endswith("positional_embedding") and _differ(n, here, there)]
    if names:
        said = ", ".join(f"{n} {list(there[n])} for {list(here[n])}" for n in names)
        raise _other_architecture(file, f"{len(names)} reshaped ({said})")


def _other_architecture(file: Path, said: str) -> UsageError:
    return UsageError(
        f"the checkpoint {file} is of another architecture",
        expected="the tensors of the model that is named before it",
        actual=said,
        remedy="name the model that it was trained as (open_clip.list_models()), with its image size",
    )


def _of(network: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _renamed(shapes: Shapes, network: nn.Module) -> Shapes:
    """As open_clip renames the tensors of old checkpoints for models that keep their text tower apart."""
    from open_clip.model import convert_to_custom_text_state_dict

    if "positional_embedding" in shapes and not hasattr(network, "positional_embedding"):
        return dict(convert_to_custom_text_state_dict(shapes))
    return shapes


def _differ(name: str, here: Shapes, there: Shapes) -> bool:
    """Scalars and vectors of one number are the same to open_clip."""
    return name in there and [d for d in here[name] if d != 1] != [d for d in there[name] if d != 1]
