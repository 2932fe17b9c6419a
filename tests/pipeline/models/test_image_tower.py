"""uint8 pixels against open_clip's own preprocessing and forward pass; memory, streams and compilation."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.models.encoder import Encoder
from pipeline.models.image_tower import Compiled
from schemas.errors import ClipmillError
from tests.pipeline.models.clips import clip_folder, encoded, picture

FILES = [encoded(picture(20 + 3 * i, 30, seed=i)) for i in range(11)]


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return Encoder(f"local-dir:{clip_folder(tmp_path, mean=[0.48, 0.45, 0.4], std=[0.26, 0.2, 0.3])}")


@pytest.fixture
def pixels(encoder: Encoder) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.stack([encoder.decode(f) for f in FILES])


class Narrow(nn.Module):
    """A tower on a device that runs out of memory above ``most`` rows."""

    def __init__(self, inner: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most, self.sizes = inner, most, []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if x.numel() > self.most * x[0].numel():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(x)


def test_normalised_here_or_by_open_clip(encoder: Encoder, pixels: Any) -> None:
    import io

    from PIL import Image

    theirs = torch.stack([encoder.preprocess(Image.open(io.BytesIO(f))) for f in FILES])
    torch.testing.assert_close(torch.stack([encoder.pixels(f) for f in FILES]), theirs, rtol=0, atol=0)
    np.testing.assert_array_equal(encoder.encode(pixels), encoder.encode(theirs))
    assert theirs.std() > 0.5  # not all the same


def test_out_of_memory_halves_the_batch_and_keeps_every_row(encoder: Encoder, pixels: Any) -> None:
    expected = encoder.encode(pixels)
    encoder.model.visual = narrow = Narrow(encoder.model.visual, most=3)
    np.testing.assert_allclose(encoder.encode(pixels), expected, atol=1e-6)
    assert narrow.sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    narrow.sizes.clear()
    np.testing.assert_allclose(
        np.concatenate(list(encoder.encode_stream([pixels[:4], pixels[4:]]))), expected, atol=1e-6
    )
    assert max(narrow.sizes) == 2  # it has not forgotten
    encoder.model.visual = Narrow(narrow.inner, most=0)
    with pytest.raises(ClipmillError, match="no memory"):
        encoder.encode(pixels)


def test_streams_give_each_batch_its_vectors_in_order(encoder: Encoder, pixels: Any) -> None:
    batches = [pixels[:4], pixels[4:4], pixels[4:5], pixels[5:]]
    found = list(encoder.encode_stream(iter(batches)))
    assert [v.shape for v in found] == [(4, 16), (0, 16), (1, 16), (6, 16)]
    np.testing.assert_allclose(np.concatenate(found), encoder.encode(pixels), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found[3], axis=1), 1, atol=1e-6)


def test_read_only_pixels_are_taken_without_a_warning(encoder: Encoder, pixels: Any) -> None:
    expected = encoder.encode(pixels)
    pixels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(encoder.encode(pixels), expected)
    np.testing.assert_array_equal(pixels, np.stack([encoder.decode(f) for f in FILES]))


def test_batch_size_is_what_was_asked_for_or_a_small_one_on_a_cpu(encoder: Encoder) -> None:
    assert encoder.batch_size(7) == 7
    assert 8 <= encoder.batch_size(0) <= 256


class Counting:
    """A compiler that runs the captured graph as it is, and counts."""

    def __init__(self) -> None:
        self.compiled: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.compiled.append(next(len(x) for x in inputs if x.shape[1:] == (3, 16, 16)))
        return graph.forward


def test_compiled_once_for_all_batches(encoder: Encoder) -> None:
    torch._dynamo.reset()
    compiler = Counting()
    compiled = Compiled(encoder.model, required=True, backend=compiler)
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = encoder.model.encode_image(x)
        for n in (6, 4, 1, 6):
            torch.testing.assert_close(compiled(x[:n], 10**9), expected[:n], atol=1e-5, rtol=1e-5)
        assert compiler.compiled.count(6) == len(compiler.compiled)
        torch.testing.assert_close(compiled(x[:2], 3), expected[:2], atol=1e-5, rtol=1e-5)  # less memory than thought
        assert 3 in compiler.compiled


def test_what_does_not_compile_is_an_error_or_runs_without(encoder: Encoder) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no compiler on this machine")

    x = torch.zeros(2, 3, 16, 16)
    torch._dynamo.reset()
    with torch.inference_mode():
        with pytest.raises(ClipmillError, match="--compile off"):
            Compiled(encoder.model, required=True, backend=broken)(x, 9)
        lenient = Compiled(encoder.model, required=False, backend=broken)
        with pytest.warns(UserWarning, match="no compiler on this machine"):
            found = lenient(x, 9)
        torch.testing.assert_close(found, encoder.model.encode_image(x))
