"""The decoder's patches, its sampler with a network that knows the answer, guidance, independence of rows."""

import pytest
import torch

from pipeline.models.decoder import Decoder, DecoderConfig


def make(**kwargs: int) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        image_size=16, patch_size=8, embed_dim=8, width=32, layers=1, head_width=16, trunk_width=32, **kwargs
    )
    return Decoder(config).eval()


def inputs(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    image, text = (torch.nn.functional.normalize(torch.randn(n, 8, generator=g), dim=-1) for _ in range(2))
    return image, text, torch.randn(n, 3, 16, 16, generator=g)


def test_patches_round_trip() -> None:
    decoder = make()
    x = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    patches = decoder.patchify(x)
    assert patches.shape == (2, 4, 192)
    torch.testing.assert_close(patches[0, 1].view(3, 8, 8), x[0, :, :8, 8:])  # the second patch: right of the first
    torch.testing.assert_close(decoder.unpatchify(patches), x)


@pytest.mark.parametrize("steps", [1, 7])
def test_sampling_finds_what_the_network_says(steps: int) -> None:
    decoder = make()
    answer = torch.linspace(-1, 1, 3 * 16 * 16).view(3, 16, 16)
    decoder.forward = lambda x, *_: answer.expand_as(x)  # type: ignore[method-assign]
    image, text, noise = inputs(2)
    torch.testing.assert_close(
        decoder.sample(image, text, noise, steps=steps, guidance=2.0), answer.expand(2, 3, 16, 16)
    )


def test_rows_do_not_depend_on_their_neighbours() -> None:
    decoder = make()
    image, text, noise = inputs(5)
    together = decoder.sample(image, text, noise, steps=3)
    alone = decoder.sample(image[2:3], text[2:3], noise[2:3], steps=3)
    torch.testing.assert_close(alone[0], together[2], atol=1e-4, rtol=1e-4)


def test_condition_matters() -> None:
    decoder = make()
    image, text, noise = inputs(2)
    a = decoder.sample(image, text, noise, steps=2)
    b = decoder.sample(image.flip(0), text.flip(0), noise, steps=2)
    assert not torch.allclose(a, b, atol=1e-3)


def test_loss_is_a_function_of_the_generator() -> None:
    decoder = make()
    image, text, noise = inputs(4)
    pictures = noise.clamp(-1, 1)
    losses = [float(decoder.loss(pictures, image, text, torch.Generator().manual_seed(s))) for s in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
