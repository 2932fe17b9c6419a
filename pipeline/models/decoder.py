"""A small decoder: CLIP image embedding (and text embedding) -> picture.

A diffusion transformer (DiT: Peebles and Xie, 2023) on large patches, with adaLN conditioning, that
predicts the picture itself (x0) on the rectified-flow path x_t = (1 - t) x0 + t noise (Liu et al.,
2023). Beside adaLN the condition enters as a canvas: one vector per patch, added to the tokens.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.rows import padded
from pipeline.models.whitening import Whitening
from schemas.networks import DecoderConfig


def time_features(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t [B] in [0, 1] -> [B, dim]."""
    frequency = torch.exp(torch.linspace(0.0, 6.0, dim // 2, device=t.device))  # 1 to 403
    angle = t[:, None] * frequency * torch.pi  # [B, dim / 2]
    return torch.cat([angle.sin(), angle.cos()], 1)


class ResidualMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, c: Tensor) -> Tensor:
        return c + self.down(F.gelu(self.up(self.norm(c)), approximate="tanh"))  # [B, C]


class Block(nn.Module):
    """A DiT block (DiT, figure 3): attention and MLP, each with its own shift, scale and gate."""

    def __init__(self, width: int, head_width: int, trunk_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(trunk_width, 6 * width)
        nn.init.normal_(self.modulation.weight, std=0.02)  # not zero: a zero start learns too late
        nn.init.zeros_(self.modulation.bias)
        with torch.no_grad():  # gates start at one half
            self.modulation.bias.view(6, width)[[2, 5]] = 0.5

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        b, n, w = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        h = self.norm1(x) * (1 + scale1) + shift1  # [B, N, W]
        q, k, v = self.qkv(h).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, N, W/H]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w)
        x = x + gate1 * self.out(h)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))  # [B, N, W]


class Decoder(nn.Module):
    """Raw unit-norm embeddings in, pictures [B, 3, S, S] in [-1, 1] out."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        side = config.image_size // config.patch_size
        pixels = 3 * config.patch_size**2
        w, c = config.width, config.trunk_width
        self.tokens = side * side
        self.image_whitening = Whitening(config.embed_dim)
        self.text_whitening = Whitening(config.embed_dim)
        conditions = config.embed_dim * (1 + config.use_text) + 2 + config.use_text
        self.condition_in = nn.Linear(conditions, c)
        self.trunk = nn.ModuleList(ResidualMLP(c) for _ in range(config.trunk_layers))
        self.time_in = nn.Sequential(nn.Linear(128, c), nn.SiLU(), nn.Linear(c, c))
        self.canvas = nn.Linear(c, self.tokens * w)
        self.patch_in = nn.Linear(pixels, w)
        self.position = nn.Parameter(torch.randn(self.tokens, w) * 0.02)
        self.blocks = nn.ModuleList(Block(w, config.head_width, c) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(w)
        self.patch_out = nn.Linear(w, pixels)

    def fit_whitening(self, image: Tensor, text: Tensor, floor: float = 1e-3) -> None:
        """Take the whitenings from unit-norm image and text embeddings [N, D]."""
        self.image_whitening.fit(image, floor)
        self.text_whitening.fit(text, floor)

    def patchify(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, 3 P^2]"""
        p = self.config.patch_size
        b, _, s, _ = x.shape
        x = x.view(b, 3, s // p, p, s // p, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(b, self.tokens, 3 * p * p)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, N, 3 P^2] -> [B, 3, S, S]"""
        p, s = self.config.patch_size, self.config.image_size
        x = x.view(len(x), s // p, s // p, 3, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(len(x), 3, s, s)

    def condition(self, image: Tensor, text: Tensor, has_image: Tensor, has_text: Tensor, blur: Tensor) -> Tensor:
        """The condition [B, C] of whitened embeddings [B, D], their presence [B] and noise level [B]."""
        parts = [image * has_image[:, None], has_image[:, None], (blur * has_image)[:, None]]
        if self.config.use_text:
            parts += [text * has_text[:, None], has_text[:, None]]
        c: Tensor = self.condition_in(torch.cat(parts, 1))  # [B, C]
        for layer in self.trunk:
            c = layer(c)
        return c

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x0 [B, 3, S, S] as the network sees it in x_t [B, 3, S, S] at t [B]."""
        canvas = self.canvas(condition).view(len(x_t), self.tokens, -1)  # [B, N, W]
        c = F.silu(condition + self.time_in(time_features(t, 128)))  # [B, C]
        x = self.patch_in(self.patchify(x_t)) + self.position + canvas  # [B, N, W]
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.patch_out(self.norm_out(x)))

    def loss(self, pictures: Tensor, image: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
        """Squared error of x0, weighted by 1 / max(t, 0.3)^2: pictures [B, 3, S, S] in [-1, 1].

        image, text [B, D]: unit-norm embeddings. Each is left out of some rows (classifier-free
        guidance: Ho and Salimans, 2022), and the image embedding gets noise of a level that the
        network is told (conditioning augmentation: Ho et al., «Cascaded Diffusion Models», 2022).
        """
        g, b, device = self.config, len(pictures), pictures.device
        draws = torch.rand(4, b, generator=generator).to(device)
        drawn = torch.randn(b, generator=generator).to(device)
        t = torch.where(
            draws[0] < g.time_late,
            1 - 0.2 * draws[0] / max(g.time_late, 1e-6),
            torch.sigmoid(g.time_mean + g.time_std * drawn),
        )  # [B]
        neither = draws[1] < g.drop_both
        alone = draws[1] < g.drop_both + g.drop_image
        silent = (draws[1] >= g.drop_both + g.drop_image) & (draws[1] < g.drop_both + g.drop_image + g.drop_text)
        has_image = (~(neither | alone)).float()  # [B]
        has_text = (~(neither | silent)).float()  # [B]
        blur = draws[2] * g.blur  # [B]
        z = self.image_whitening(image)  # [B, D]
        z = z + blur[:, None] * torch.randn(z.shape, generator=generator).to(device)
        noise = torch.randn(pictures.shape, generator=generator).to(device)
        x_t = torch.lerp(pictures, noise, t[:, None, None, None])
        condition = self.condition(z, self.text_whitening(text), has_image, has_text, blur)
        error = (self(x_t, t, condition) - pictures).square().mean((1, 2, 3))  # [B]
        return (error / t.clamp(min=0.3).square()).mean()

    @torch.no_grad()
    def sample(
        self,
        image: Tensor,
        text: Tensor,
        noise: Tensor,
        *,
        steps: int = 12,
        guidance: float = 2.0,
        blur: float = 0.0,
    ) -> Tensor:
        """Euler steps from noise [B, 3, S, S] at t = 1 to pictures in [-1, 1] at t = 0.

        image, text [B, D]: unit-norm embeddings; blur: how far the image embedding is to be
        trusted (the noise level it is taken to have).
        """
        rows = len(noise)
        image, text, noise = padded(image, text, noise)
        ones = torch.ones(len(noise), device=noise.device)
        z, z_text = self.image_whitening(image), self.text_whitening(text)
        given = self.condition(z, z_text, ones, ones, blur * ones)  # [B, C]
        nothing = self.condition(z, z_text, 0 * ones, 0 * ones, 0 * ones)
        x = noise
        times = torch.linspace(1, 0, steps + 1).tolist()
        for t, t_next in pairwise(times):
            x0 = self(x, t * ones, given)
            if guidance != 1:
                x0_nothing = self(x, t * ones, nothing)
                x0 = x0_nothing + guidance * (x0 - x0_nothing)
            x0 = x0.clamp(-1, 1)
            x = x0 + (x - x0) * (t_next / t)  # the straight line to x0
        return x[:rows]
