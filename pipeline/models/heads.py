"""Heads: a score of an image from its unit-norm CLIP vector, linear or MLP, from safetensors alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from schemas.cards import EncoderCard
from schemas.errors import EncoderMismatch, UsageError

_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}
_OUTPUTS = {"identity": lambda x: x, "sigmoid": torch.sigmoid}
_MEAN, _VARIANCE = "norm.mean", "norm.variance"
_BLOCK = 8192
"""Vectors scored at once: a wide layer's activations stay small."""
_PICKLES = (b"\x80", b"PK\x03\x04")
"""How a pickle and torch's archive of one begin."""


@dataclass(frozen=True)
class Layer:
    """y = activation(x W^T + b): weight [O, I], bias [O]."""

    weight: Tensor
    bias: Tensor
    activation: str = "none"


@dataclass(frozen=True, eq=False)
class Head:
    """Unit-norm image vectors -> a score each. Picklable.

    ``mean``, ``variance`` [D]: the vectors are standardised with them first, where there are any. ``encoder``: id of
    the card, or sha256 of the weights, of the encoder whose vectors it was trained on; empty where nobody said.
    """

    name: str
    layers: tuple[Layer, ...]
    output: str = "identity"
    encoder: str = ""
    mean: Tensor | None = None
    variance: Tensor | None = None

    @property
    def dim(self) -> int:
        """D of the vectors that it takes."""
        return int(self.layers[0].weight.shape[1])

    def require(self, card: EncoderCard) -> None:
        """Check that it can score this encoder's vectors.

        Raises:
            UsageError: it takes vectors of another length.
            EncoderMismatch: it was trained on another encoder's.
        """
        if card.dim != self.dim:
            raise UsageError(
                f"the head {self.name} does not fit the encoder {card.id}",
                expected=f"a head over D={card.dim}",
                actual=f"D={self.dim}",
                remedy="use a head that was trained on this encoder's vectors",
            )
        if self.encoder not in ("", card.id, card.weights_sha256):
            raise EncoderMismatch(
                f"the head {self.name} was trained on another encoder's vectors",
                expected=self.encoder,
                actual=f"{card.id} (weights {card.weights_sha256})",
                remedy="use a head that was trained on this encoder's vectors",
            )

    @torch.inference_mode()
    def __call__(self, vectors: NDArray[np.floating]) -> NDArray[np.float32]:
        """Unit-norm [N, D] -> float32 [N].

        Raises:
            UsageError: vectors of another length.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise UsageError(
                f"the head {self.name} does not fit these vectors",
                expected=f"[N, {self.dim}]",
                actual=str(vectors.shape),
            )
        out = np.empty(len(vectors), np.float32)
        for start in range(0, len(vectors), _BLOCK):
            x = torch.from_numpy(np.array(vectors[start : start + _BLOCK], np.float32))  # [B, D]
            out[start : start + len(x)] = self._scores(x).numpy()
        return out

    def _scores(self, x: Tensor) -> Tensor:
        if self.mean is not None and self.variance is not None:
            x = (x - self.mean) / (self.variance.sqrt() + 1e-10)
        for layer in self.layers:
            x = _ACTIVATIONS[layer.activation](F.linear(x, layer.weight, layer.bias))
        scores: Tensor = _OUTPUTS[self.output](x[:, 0])  # [B]
        return scores


def load_head(spec: str, card: EncoderCard | None = None) -> Head:
    """The head that ``NAME=FILE.safetensors`` names; with ``card``, checked against that encoder.

    The file's tensors are linear layers, ``*.weight`` [O, I] and ``*.bias`` [O], in the order of the numbers in their
    names, the last one with O = 1. Its metadata says the rest: ``activation`` (none, relu or gelu, between all layers;
    or one for each, separated by commas), ``output`` (identity or sigmoid) and ``encoder`` (a card's id or weights'
    sha256). ``norm.mean`` and ``norm.variance`` [D] standardise the vectors first. :func:`save_head` writes such files.

    Without metadata these are known by their tensors, over vectors of any D: a single linear layer (LAION's aesthetic
    predictor); its successor, the «improved aesthetic predictor», without activations or with relu; LAION's NSFW
    detectors for ViT-B-32, ViT-L-14 and ViT-H-14 (github.com/LAION-AI/CLIP-based-NSFW-Detector).

    Raises:
        UsageError: not NAME=FILE, no safetensors, tensors that make no head, or vectors of another length.
        EncoderMismatch: the file names another encoder.
    """
    name, equals, file = spec.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or not file:
        raise UsageError(
            f"{spec!r} is no head", expected="NAME=FILE.safetensors, NAME of letters, digits and underscores"
        )
    tensors, metadata = _read(Path(file))
    head = _build(name, file, tensors, metadata)
    if card is not None:
        head.require(card)
    return head


def save_head(
    path: str | Path,
    layers: Sequence[tuple[Tensor, Tensor]],
    *,
    activation: str = "none",
    output: str = "identity",
    encoder: str = "",
) -> None:
    """Write a head that :func:`load_head` reads: (weight [O, I], bias [O]) of each linear layer, in order."""
    tensors: dict[str, Tensor] = {}
    for i, (weight, bias) in enumerate(layers):
        tensors |= {f"layers.{i}.weight": weight.detach().cpu(), f"layers.{i}.bias": bias.detach().cpu()}
    metadata = {"activation": activation, "output": output} | ({"encoder": encoder} if encoder else {})
    _build("head", str(path), tensors, metadata)  # raises for what would not load
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError as exc:
        raise UsageError(f"cannot read the head {path}", actual=exc.strerror or str(exc)) from exc
    except SafetensorError as exc:
        with path.open("rb") as raw:
            pickled = raw.read(4).startswith(_PICKLES)
        raise UsageError(
            f"the head {path} is no safetensors file",
            expected="safetensors",
            actual="a pickle, which may run any code when it is read" if pickled else str(exc),
            remedy="convert it where you trust it: save_file(torch.load(FILE, weights_only=True), 'head.safetensors'), "
            "save_file from safetensors.torch",
        ) from exc


def _build(name: str, file: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Head:
    """The head that these tensors and metadata make. Raises UsageError, naming ``file``, for what makes none."""
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    norm = tensors.pop(_MEAN, None), tensors.pop(_VARIANCE, None)
    places = sorted({key.rpartition(".")[0] for key in tensors}, key=_natural)
    layers = [_layer(file, tensors, place) for place in places]
    if any(key.rpartition(".")[2] not in ("weight", "bias") for key in tensors):
        raise _no_head(file, tensors)
    _check_shapes(file, layers, norm, tensors)
    known = _known(places, [int(layer.weight.shape[0]) for layer in layers], norm[0] is not None)
    activation, output = metadata.get("activation", known[0]), metadata.get("output", known[1])
    if activation is None:
        raise UsageError(
            f"the head {file} does not say which activation is between its layers",
            expected='"activation": "relu", "gelu" or "none" in the metadata of the file',
            actual=f"layers {', '.join(places)}",
            remedy="write it with pipeline.models.heads.save_head, or with save_file(tensors, path, metadata)",
        )
    chosen = [*_activations(file, activation, len(layers) - 1), "none"]
    if output not in _OUTPUTS:
        raise UsageError(f"the head {file} has an unknown output", expected=", ".join(_OUTPUTS), actual=str(output))
    stack = tuple(replace(layer, activation=a) for layer, a in zip(layers, chosen, strict=True))
    return Head(name, stack, output, metadata.get("encoder", ""), *norm)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: numbers inside names by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _layer(file: str, tensors: dict[str, Tensor], place: str) -> Layer:
    prefix = f"{place}." if place else ""
    weight = tensors.get(f"{prefix}weight")
    if weight is None or weight.ndim != 2:
        raise _no_head(file, tensors)
    bias = tensors.get(f"{prefix}bias", torch.zeros(weight.shape[0]))
    if bias.shape != weight.shape[:1]:
        raise _no_head(file, tensors)
    return Layer(weight, bias)


def _check_shapes(
    file: str, layers: list[Layer], norm: tuple[Tensor | None, Tensor | None], tensors: dict[str, Tensor]
) -> None:
    """Each layer takes what the one before gives, the last gives one number, and all are finite."""
    if not layers or layers[-1].weight.shape[0] != 1:
        raise _no_head(file, tensors)
    if any(a.weight.shape[0] != b.weight.shape[1] for a, b in pairwise(layers)):
        raise _no_head(file, tensors)
    if (norm[0] is None) != (norm[1] is None) or any(
        n is not None and n.shape != layers[0].weight.shape[1:] for n in norm
    ):
        raise _no_head(file, tensors)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UsageError(f"the head {file} holds numbers that are not finite")


def _no_head(file: str, tensors: dict[str, Tensor]) -> UsageError:
    shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(tensors.items()))
    return UsageError(
        f"the tensors of {file} make no head",
        expected="linear layers, *.weight [O, I] and *.bias [O], one after the other, the last with O = 1",
        actual=shapes[:500] or "no tensors",
    )


def _activations(file: str, text: str, wanted: int) -> list[str]:
    """Of each layer but the last one."""
    names = [part.strip() for part in text.split(",")]
    names = names * wanted if len(names) == 1 else names
    if set(names) - set(_ACTIVATIONS) or len(names) != wanted:
        raise UsageError(
            f"the head {file} has an unknown activation",
            expected=f"one of {', '.join(_ACTIVATIONS)}, or {wanted} of them separated by commas",
            actual=text,
        )
    return names


_LAION: dict[tuple[str, tuple[int, ...]], tuple[str, str]] = {
    ("layers.0 layers.2 layers.4 layers.6 layers.7", (1024, 128, 64, 16, 1)): ("none", "identity"),
    ("layers.0 layers.3 layers.6 layers.9 layers.11", (1024, 128, 64, 16, 1)): ("relu", "identity"),
    (
        "layers.0 layers.3 layers.6 layers.9 layers.12 layers.15 layers.16",
        (1024, 2048, 1024, 256, 128, 16, 1),
    ): ("relu,relu,relu,relu,relu,none", "identity"),
    ("linear_1 linear_2 linear_3", (32, 32, 1)): ("relu", "sigmoid"),
    ("linear_1 linear_2 linear_3 linear_4", (64, 512, 256, 1)): ("relu", "sigmoid"),
}
"""Names and widths of the layers -> activation and output, in the order of :func:`load_head`'s docstring."""


def _known(places: list[str], widths: list[int], norm: bool) -> tuple[str | None, str]:
    """(activation, output) of what is known by its tensors; None where they do not say."""
    if len(places) == 1:
        return "none", "identity"
    activation, output = _LAION.get((" ".join(places), tuple(widths)), (None, "identity"))
    return (activation, output) if (output == "sigmoid") == norm else (None, "identity")
