"""The diffusion prior of DALL-E 2 (Ramesh et al., 2022, section 2.2): text -> CLIP image embedding.

The network is diffusers' `PriorTransformer`. It works on whitened image embeddings and predicts them
directly (x0), on the squared-cosine schedule (Nichol and Dhariwal, 2021).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from diffusers import PriorTransformer
from torch import Tensor, nn

from pipeline.models.rows import padded
from pipeline.models.whitening import Whitening
from schemas.networks import PriorConfig


def squared_cosine(timesteps: int) -> Tensor:
    """Cumulative alphas [T] of the squared-cosine schedule, as diffusers' `squaredcos_cap_v2`."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / timesteps) / alpha_bar(i / timesteps), 0.999) for i in range(timesteps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0).float()


class DiffusionPrior(nn.Module):
    """Text embedding and token states in, image embedding out; raw unit-norm vectors at both ends."""

    alpha_bar: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.image_whitening = Whitening(config.embed_dim)
        self.text_whitening = Whitening(config.embed_dim)
        self.states_in: nn.Module = nn.Identity()
        if config.use_states and config.state_dim != config.embed_dim:
            self.states_in = nn.Linear(config.state_dim, config.embed_dim)
        self.network = PriorTransformer(
            num_attention_heads=config.width // config.head_width,
            attention_head_dim=config.head_width,
            num_layers=config.layers,
            embedding_dim=config.embed_dim,
            num_embeddings=config.context_length if config.use_states else 0,
            encoder_hid_proj_type="linear" if config.use_states else None,
        )
        for embedding in (self.network.positional_embedding, self.network.prd_embedding):
            nn.init.normal_(cast(Tensor, embedding), std=0.02)
        self.register_buffer("alpha_bar", squared_cosine(config.timesteps), persistent=False)

    def fit_whitening(self, image: Tensor, text: Tensor, floor: float = 1e-3) -> None:
        """Take the whitenings from unit-norm image and text embeddings [N, D]."""
        self.image_whitening.fit(image, floor)
        self.text_whitening.fit(text, floor)

    def denoise(self, z_t: Tensor, t: Tensor, text: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """The whitened embedding [B, D] that the network sees in z_t [B, D] at step t [B]."""
        words = {}
        if self.config.use_states:
            words = {"encoder_hidden_states": self.states_in(states), "attention_mask": mask}  # [B, L, D], [B, L]
        out = self.network(
            z_t,  # [B, D]
            t,  # [B]
            proj_embedding=self.text_whitening(text),  # [B, D]
            **words,
        )
        return cast(Tensor, out.predicted_image_embedding)

    def loss(self, image: Tensor, text: Tensor, states: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of x0 (DALL-E 2, equation 2): image, text [B, D] unit-norm."""
        z = self.image_whitening(image)  # [B, D]
        t = torch.randint(0, self.config.timesteps, (len(z),), generator=generator).to(z.device)
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        a = self.alpha_bar[t][:, None]  # [B, 1]
        z_t = a.sqrt() * z + (1 - a).sqrt() * noise
        return (self.denoise(z_t, t, text, states, mask) - z).square().mean()

    @torch.no_grad()
    def sample(self, text: Tensor, states: Tensor, mask: Tensor, noise: Tensor, steps: int = 5) -> Tensor:
        """DDIM without added noise (Song et al., 2021, equation 12): noise [B, D] -> unit-norm [B, D]."""
        rows = len(noise)
        text, states, mask, noise = padded(text, states, mask, noise)
        times = torch.linspace(self.config.timesteps - 1, 0, steps + 1).round().long()[:-1].tolist()
        z_t = noise  # [B, D]
        z = noise
        for t, t_next in zip(times, [*times[1:], None], strict=True):
            z = self.denoise(z_t, torch.full((len(z_t),), t, device=z_t.device), text, states, mask)
            if t_next is not None:
                a, a_next = self.alpha_bar[t], self.alpha_bar[t_next]
                eps = (z_t - a.sqrt() * z) / (1 - a).sqrt()
                z_t = a_next.sqrt() * z + (1 - a_next).sqrt() * eps
        return nn.functional.normalize(self.image_whitening.inverse(z[:rows]), dim=-1)
