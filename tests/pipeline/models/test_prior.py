"""The prior's schedule against diffusers', its sampler against a network that knows the answer."""

import torch
from diffusers import DDPMScheduler

from pipeline.models.prior import DiffusionPrior, PriorConfig, squared_cosine


def make(**kwargs: int) -> DiffusionPrior:
    torch.manual_seed(0)
    config = PriorConfig(embed_dim=8, state_dim=8, context_length=6, width=32, head_width=16, layers=1, **kwargs)
    return DiffusionPrior(config).eval()


def inputs(n: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    text = torch.nn.functional.normalize(torch.randn(n, 8, generator=g), dim=-1)
    return text, torch.randn(n, 6, 8, generator=g), torch.ones(n, 6, dtype=torch.bool), torch.randn(n, 8, generator=g)


def test_schedule_is_diffusers() -> None:
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(squared_cosine(1000), theirs, atol=1e-5, rtol=1e-4)


def test_sampling_finds_what_the_network_says() -> None:
    prior = make()
    answer = torch.nn.functional.normalize(torch.arange(8.0) + 1, dim=-1)
    prior.denoise = lambda z, *_: answer.expand(len(z), 8)  # type: ignore[method-assign]
    text, states, mask, noise = inputs(2)
    torch.testing.assert_close(prior.sample(text, states, mask, noise, 5), answer.expand(2, 8))


def test_rows_do_not_depend_on_their_neighbours() -> None:
    prior = make()
    text, states, mask, noise = inputs(4)
    together = prior.sample(text, states, mask, noise, 3)
    for i in range(4):
        alone = prior.sample(text[i : i + 1], states[i : i + 1], mask[i : i + 1], noise[i : i + 1], 3)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)


def test_loss_is_a_function_of_the_generator() -> None:
    prior = make()
    text, states, mask, _ = inputs(4)
    losses = [float(prior.loss(text, text, states, mask, torch.Generator().manual_seed(s))) for s in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
