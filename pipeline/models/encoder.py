"""A CLIP encoder as it was really loaded: any open_clip model, hub id, folder or checkpoint, and its card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models.attention import use_class_token_only, use_self_attention
from pipeline.models.clip import text_states
from pipeline.models.devices import Place, pick_device, pick_dtype
from pipeline.models.image_tower import Compiled, ImageTower, as_tensor
from pipeline.models.loading import load, read_model_config
from pipeline.models.pixels import Decoder, Pixels
from pipeline.models.quantised import cosines, int8_card, quantise
from pipeline.models.text_tower import TextTower
from pipeline.models.weights import weights_sha256

__all__ = ["Encoder", "pick_device", "pick_dtype", "read_model_config", "weights_sha256"]

_TOKENISED_AT_ONCE = 16_384


class Encoder:
    """Images and texts to unit-norm vectors, with the model's own preprocessing and tokenizer.

    ``card`` describes the vectors; ``float_card`` the same weights unquantised (the same card but for int8).
    ``decoder`` turns image files into pixels; it can be pickled, and does not need the model.

    Args:
        spec: ``MODEL``, ``MODEL:TAG``, ``MODEL:PATH``, ``hf-hub:ID`` or ``local-dir:PATH``.
        name: what the card calls the model, where ``spec`` is only a place.
        precision: auto, float32, float16, bfloat16 or int8.
        compile: torch.compile for the image tower. auto: on a GPU, and without it where that fails.

    Raises:
        UsageError: open_clip knows no such model or tag, cannot load it, or the checkpoint is refused.
    """

    def __init__(self, spec: str, *, name: str | None = None, precision: str = "auto", compile: str = "off") -> None:
        self.device = pick_device()
        self.dtype = pick_dtype(precision, self.device)
        self._spec = spec
        loaded = load(spec)
        self.preprocess, self.tokenizer = loaded.preprocess, loaded.tokenizer
        self.model: Any = loaded.model.eval().requires_grad_(False)
        self.float_card = self.card = loaded.card(name).model_copy(update={"dtype": str(self.dtype).split(".")[1]})
        use_self_attention(self.model)  # after the card: this renames weights
        use_class_token_only(self.model)
        if self.dtype == torch.int8:
            self.float_card = self.card.model_copy(update={"dtype": "float32"})
            self.card = int8_card(self.float_card)
            self.model = quantise(self.model, self.card.image_size, self.tokens(["a"]))
        self.model.to(self.device)
        self.decoder = Decoder(self.card)
        place = Place(self.device, self.dtype)
        wanted = compile == "on" or (compile == "auto" and self.device.type == "cuda")
        compiled = Compiled(self.model, required=compile == "on") if wanted else None
        self._images = ImageTower(self.model, self.card, place, compiled=compiled)
        self._texts = TextTower(self.model, place)

    # ---- images --------------------------------------------------------------------------------------

    def images(self, images: Sequence[bytes], batch_size: int = 64) -> NDArray[np.float32]:
        """Encoded image files -> unit-norm float32 [N, D]. Raises Undecodable for one that does not decode."""
        starts = range(0, len(images), batch_size)
        parts = [self.encode(np.stack([self.decode(d) for d in images[i : i + batch_size]])) for i in starts]
        return np.concatenate(parts) if parts else np.empty((0, self.card.dim), np.float32)

    def decode(self, data: bytes) -> Pixels:
        """One encoded image file -> uint8 [3, S, S]. Raises Undecodable."""
        return self.decoder(data)

    def encode(self, pixels: Tensor | Pixels) -> NDArray[np.float32]:
        """Pixels [B, 3, S, S], uint8 as decoded or floats as preprocessed -> unit-norm float32 [B, D].

        A batch that the device has no memory for is halved, and so are all after it.

        Raises:
            ClipmillError: there is no memory even for one image.
        """
        return np.asarray(self._images(as_tensor(pixels)).cpu().numpy())

    def encode_stream(self, batches: Iterable[Pixels]) -> Iterator[NDArray[np.float32]]:
        """As :meth:`encode`, batch by batch; on a GPU one is copied while another is computed."""
        return self._images.stream(batches)

    def batch_size(self, asked: int) -> int:
        """``asked`` if above 0, else the number of images in a forward pass that does best here."""
        return self._images.batch_size(asked)

    def pixels(self, data: bytes) -> Tensor:
        """One encoded image file, preprocessed: float32 [3, S, S] on the device. Raises Undecodable."""
        return self._images.normalise(as_tensor(self.decode(data)).to(self.device)[None])[0]

    # ---- texts ---------------------------------------------------------------------------------------

    def texts(self, texts: Sequence[str], batch_size: int = 256) -> NDArray[np.float32]:
        """Texts -> unit-norm float32 [N, D]. Equal texts are encoded once, and padding only where it must be.

        A forward pass has the tokens of up to ``batch_size`` texts of full length, so more texts if they are short.
        """
        row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        unique = list(row)
        vectors = np.empty((len(unique), self.card.dim), np.float32)
        for start in range(0, len(unique), _TOKENISED_AT_ONCE):
            some = unique[start : start + _TOKENISED_AT_ONCE]
            vectors[start : start + len(some)] = self._texts(self.tokens(some), batch_size).numpy()
        return vectors[[row[text] for text in texts]]

    @torch.inference_mode()
    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """What a prior conditions on: unit-norm embedding [B, D], states [B, L, W], mask [B, L]."""
        return text_states(self.model, self.tokens(texts).to(self.device))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """[B, L] int64; what is longer than L is cut."""
        tokens: Tensor = self.tokenizer(list(texts))
        return tokens

    # ---- int8 ----------------------------------------------------------------------------------------

    def int8_cosine(self, images: Sequence[bytes], texts: Sequence[str]) -> dict[str, float]:
        """How close this encoder's vectors are to float32's: image_mean, image_min, text_mean, text_min.

        Loads the float32 model beside this one. Images that do not decode raise Undecodable.
        """
        exact = Encoder(self._spec, precision="float32")
        found = cosines(self.images(images), exact.images(images), "image")
        return found | cosines(self.texts(texts), exact.texts(texts), "text")
