"""A CLIP encoder as it was really loaded: any open_clip model, hub id or local folder, and its card."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pipeline.models.clip import text_states
from schemas.cards import EncoderCard
from schemas.errors import UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """auto: float32 on CPU (its bfloat16 may be emulated), bfloat16 or float16 on GPU.

    Raises:
        UsageError: half precision asked for on a CPU.
    """
    if device.type == "cpu":
        if precision in ("float16", "bfloat16"):
            raise UsageError(f"--precision {precision} needs a GPU", remedy="use auto or float32")
        return torch.float32
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return DTYPES[precision]


def weights_sha256(module: nn.Module) -> str:
    """sha256 over the names, shapes, types and bytes of a module's state, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Encoder:
    """Images and texts to unit-norm vectors, with the model's own preprocessing and tokenizer.

    Args:
        spec: ``MODEL``, ``MODEL:TAG``, ``MODEL:PATH``, ``hf-hub:ID`` or ``local-dir:PATH``.
        name: what the card calls the model, where ``spec`` is only a place.

    Raises:
        UsageError: open_clip knows no such model or tag, or cannot load it.
    """

    def __init__(self, spec: str, *, name: str | None = None, precision: str = "auto") -> None:
        self.device = pick_device()
        self.dtype = pick_dtype(precision, self.device)
        model, pretrained = _split(spec)
        self.model, self.preprocess, self.tokenizer = _load(model, pretrained)
        self.model.eval().requires_grad_(False)
        self.card = _card(self.model, name or model, pretrained or spec, self.tokenizer, self.dtype)
        self.model.to(self.device)

    def images(self, images: Sequence[bytes], batch_size: int = 256) -> NDArray[np.float32]:
        """Encoded image files -> unit-norm float32 [N, D]. Raises what Pillow raises for one it cannot decode."""
        starts = range(0, len(images), batch_size)
        parts = [self.encode(torch.stack([self.pixels(d) for d in images[i : i + batch_size]])) for i in starts]
        return np.concatenate(parts) if parts else np.empty((0, self.card.dim), np.float32)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> NDArray[np.float32]:
        """Preprocessed pixels [B, 3, S, S] -> unit-norm float32 [B, D]."""
        with self._autocast():
            return _unit([self.model.encode_image(pixels.to(self.device))], self.card.dim)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch_size: int = 256) -> NDArray[np.float32]:
        """Texts -> unit-norm float32 [N, D]. Equal texts are encoded once."""
        unique = sorted(set(texts))
        parts = []
        for start in range(0, len(unique), batch_size):
            tokens = self.tokens(unique[start : start + batch_size]).to(self.device)  # [B, L]
            with self._autocast():
                parts.append(self.model.encode_text(tokens))
        where = {text: i for i, text in enumerate(unique)}
        return _unit(parts, self.card.dim)[[where[text] for text in texts]]

    @torch.inference_mode()
    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """What a prior conditions on: unit-norm embedding [B, D], states [B, L, W], mask [B, L]."""
        return text_states(self.model, self.tokens(texts).to(self.device))

    def pixels(self, data: bytes) -> Tensor:
        """One encoded image file, preprocessed: [3, S, S]."""
        with Image.open(io.BytesIO(data)) as image:
            pixels: Tensor = self.preprocess(image.convert("RGB"))
        return pixels

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """[B, L] int64; what is longer than L is cut."""
        tokens: Tensor = self.tokenizer(list(texts))
        return tokens

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


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
    """("ViT-B-32", "openai") of "ViT-B-32:openai"; hub ids and folders stay whole."""
    if spec.startswith(("hf-hub:", "local-dir:")):
        return spec, None
    model, _, pretrained = spec.partition(":")
    return model, pretrained or None


def _load(model: str, pretrained: str | None) -> tuple[Any, Any, Any]:
    import open_clip

    if pretrained is None and ":" not in model:
        raise UsageError(
            f"the encoder {model} has no weights",
            expected=f"{model}:TAG or {model}:PATH (or the name of a CLIP trained in this workspace)",
            remedy=f"tags of it: {', '.join(open_clip.list_pretrained_tags_by_model(model)) or 'none'}",
        )
    try:
        loaded, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained=pretrained, weights_only=True, load_weights=True
        )
        return loaded, preprocess, open_clip.get_tokenizer(model)
    except (RuntimeError, OSError, ValueError, KeyError) as exc:
        raise UsageError(
            f"cannot load the encoder {model}{':' + pretrained if pretrained else ''}",
            expected="MODEL[:TAG|:PATH], hf-hub:ID, local-dir:PATH, or the name of a CLIP trained in this workspace",
            actual=str(exc).splitlines()[0] if str(exc) else type(exc).__name__,
            remedy="open_clip.list_pretrained() lists models and tags; weights must be cached or within reach",
        ) from exc


def _card(model: Any, name: str, pretrained: str, tokenizer: Any, dtype: torch.dtype) -> EncoderCard:
    preprocess = model.visual.preprocess_cfg
    size = model.visual.image_size
    width = model.text_projection if hasattr(model, "text_projection") else model.text.text_projection
    dim = width.out_features if isinstance(width, nn.Linear) else width.shape[1]
    return EncoderCard(
        model=name,
        pretrained=pretrained,
        weights_sha256=weights_sha256(model),
        dim=int(dim),
        image_size=int(size[0] if isinstance(size, (tuple, list)) else size),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        interpolation=preprocess["interpolation"],
        resize_mode=preprocess["resize_mode"],
        context_length=int(tokenizer.context_length),
        dtype=str(dtype).removeprefix("torch."),
        quick_gelu=any(type(m).__name__ == "QuickGELU" for m in model.modules()),
    )


def _unit(parts: list[Tensor], dim: int) -> NDArray[np.float32]:
    if not parts:
        return np.empty((0, dim), np.float32)
    vectors = F.normalize(torch.cat(parts).float(), dim=-1)  # [N, D]
    return np.asarray(vectors.cpu().numpy())
