"""CLIP (Radford et al., 2021) on open_clip's networks: building, losses, text states, reranking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

Gather = Callable[[Tensor], Tensor]


def build_clip(config: Mapping[str, Any]) -> CLIP:
    """An open_clip CLIP from {"embed_dim", "vision_cfg", "text_cfg", ...}, randomly initialised.

    The mapping has the layout of open_clip's own model configs, so a JSON file of its
    `model_configs` works as it is.
    """
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"}
    if unknown := set(config) - known:
        raise ValueError(f"expected keys among {sorted(known)}, got {sorted(unknown)}")
    text = dict(config["text_cfg"])
    vision = dict(config["vision_cfg"])
    rest = {k: config[k] for k in ("quick_gelu", "init_logit_scale") if k in config}
    return CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=CLIPVisionCfg(**vision),
        text_cfg=CLIPTextCfg(**text),
        **rest,
    )


# ---- losses --------------------------------------------------------------------------------------


def no_gather(x: Tensor) -> Tensor:
    return x


def gather_with_grad(x: Tensor) -> Tensor:
    """All workers' rows in rank order [W * B, D]; gradients flow back to the rows' owners."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(cast("tuple[Tensor, ...]", all_gather(x)))


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    negatives: Tensor | None = None,
    gather: Gather = no_gather,
) -> Tensor:
    """The symmetric cross-entropy over cosine similarities (CLIP, section 2.3 and figure 3).

    image, text [B, D]: unit-norm embeddings of matching pairs; logit_scale: scalar, exp(t).
    negatives [M, D]: embeddings of false captions, further wrong answers for every image
    (NegCLIP: Yuksekgonul et al., «When and why vision-language models behave like bags-of-words»,
    2023, section 4). With `gather`, every worker holds its own B rows of one large batch and gets
    the loss of the whole; averaging the gradients over the workers then gives that batch's gradient.
    """
    image, text = gather(image), gather(text)  # [N, D]
    answers = text if negatives is None else torch.cat([text, gather(negatives)])  # [N (+ M), D]
    logits_per_image = logit_scale * image @ answers.T  # [N, N (+ M)]
    logits_per_text = logits_per_image[:, : len(text)].T  # [N, N]
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_text, target)) / 2


def decorrelation_loss(embedding: Tensor, *, gather: Gather = no_gather) -> Tensor:
    """Variance and covariance terms of VICReg (Bardes et al., 2022, equations 1 to 4).

    embedding [B, D]: unit-norm. It is scaled by sqrt(D), so that an embedding which uses every
    dimension alike has standard deviation 1 in each.
    """
    z = gather(embedding) * embedding.shape[1] ** 0.5  # [N, D]
    z = z - z.mean(0)
    n, d = z.shape
    covariance = z.T @ z / (n - 1)  # [D, D]
    variance = covariance.diagonal()
    off_diagonal = (covariance.square().sum() - variance.square().sum()) / d
    hinge = F.relu(1 - (variance + 1e-4).sqrt()).mean()
    return off_diagonal + hinge


class OrderedPairs(nn.Module):
    """Predicts from an embedding which token comes before which in the caption, by a linear layer.

    A contrastive loss lingers at a saddle where both towers know the words of a caption but not
    their order, since neither gains by encoding it first. Classifying captions' tokens from the image
    (SuperClass: Huang et al., «Classification Done Right for Vision-Language Pre-Training», 2024)
    has no such saddle; here the classes are ordered pairs of tokens (paired with the start of the
    text, every single token is among them). The layer is thrown away after training.
    """

    codes: Tensor
    share: Tensor

    def __init__(self, tokens: Tensor, dim: int, *, classes: int = 2048) -> None:
        """tokens [N, L]: training captions; kept are the pairs whose presence is most uncertain."""
        super().__init__()
        tokens = tokens[:: max(len(tokens) // 50_000, 1)]
        parts = (self._pairs(part) for part in tokens.split(1024))
        codes, counts = torch.cat([codes[codes >= 0] for codes in parts]).unique(return_counts=True)
        share = counts / len(tokens)
        doubt = share * (1 - share).clamp(min=0)
        kept = doubt.topk(min(classes, len(codes))).indices.sort().values
        self.register_buffer("codes", codes[kept])  # [K], ascending
        self.register_buffer("share", share[kept].float().clamp(1e-6, 1 - 1e-6))  # [K]
        self.linear = nn.Linear(dim, len(kept))
        with torch.no_grad():
            self.linear.bias.copy_(self.share.logit())

    @staticmethod
    def _pairs(tokens: Tensor) -> Tensor:
        """One number for every ordered pair of tokens [B, L * L]; -1 if not in order or repeated."""
        length = tokens.shape[1]
        place = torch.arange(length, device=tokens.device)
        end = tokens.argmax(1)[:, None, None]  # [B, 1, 1]
        valid = (place[:, None] < place) & (place < end)  # [B, L, L]
        codes = torch.where(valid, tokens[:, :, None] * 2**24 + tokens[:, None, :], -1).flatten(1)
        codes = codes.sort(1).values
        codes[:, 1:][codes[:, 1:] == codes[:, :-1]] = -1
        return codes

    def targets(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> presence of every class [B, K], 0 or 1."""
        codes = self._pairs(tokens)
        found = torch.searchsorted(self.codes, codes).clamp(max=len(self.codes) - 1)
        present = (self.codes[found] == codes).float()
        return torch.zeros(len(tokens), len(self.codes), device=tokens.device).scatter_reduce(1, found, present, "amax")

    def loss(self, embedding: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy as a part of its value without any knowledge of the image: 1 -> 0.

        embedding [B, D]: unit-norm; targets [B, K].
        """
        logits = self.linear(embedding * embedding.shape[1] ** 0.5)  # [B, K]
        p = self.share
        ignorance = -(p * p.log() + (1 - p) * (1 - p).log()).sum()
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return loss.sum(1).mean() / ignorance


# ---- false captions --------------------------------------------------------------------------------


class SpanSwaps:
    """Makes false captions by swapping two spans of a true one, knowing nothing of its language.

    NegCLIP swaps words of one part of speech. Here two spans of one length (up to `longest` tokens)
    are swapped if every pair of neighbours this makes occurs somewhere in the training captions:
    «a red cube on a blue ball» -> «a blue cube on a red ball», never «a cube red on a blue ball».
    """

    def __init__(self, tokens: Tensor, *, longest: int = 4) -> None:
        """tokens [N, L]: the training captions."""
        self.longest = longest
        self.seen = torch.cat([self._codes(t[:, :-1], t[:, 1:]).unique() for t in tokens.split(65536)]).unique()

    @staticmethod
    def _codes(first: Tensor, second: Tensor) -> Tensor:
        return first * 2**24 + second

    def _follows(self, first: Tensor, second: Tensor) -> Tensor:
        """Whether the second token came right after the first somewhere in the training captions."""
        codes = self._codes(first, second)
        found = torch.searchsorted(self.seen, codes).clamp(max=len(self.seen) - 1)
        return self.seen[found] == codes

    def swaps(self, tokens: Tensor) -> Tensor:
        """Which swaps are plausible: tokens [B, L] -> [B, S, L, L], spans of s + 1 tokens at i < j."""
        length = tokens.shape[1]
        follows = self._follows(tokens[:, :, None], tokens[:, None, :])  # [B, L, L]: q after p is known
        back = follows.transpose(1, 2)
        differ = tokens[:, :, None] != tokens[:, None, :]  # [B, L, L]
        end = tokens.argmax(1)[:, None, None]  # [B, 1, 1], end of text has the highest number
        i, j = torch.arange(length)[:, None], torch.arange(length)  # [L, 1], [L]

        def at(m: Tensor, di: int, dj: int) -> Tensor:
            return m.roll((-di, -dj), (1, 2))  # m[i + di, j + dj]; what wraps around is out of range

        unlike, found = torch.zeros_like(differ), []
        for s in range(1, self.longest + 1):
            unlike = unlike | at(differ, s - 1, s - 1)
            joins = at(follows, -1, 0) & at(back, s, s - 1) & at(back, 0, -1) & at(follows, s - 1, s)
            found.append(joins & unlike & (i >= 1) & (j > i + s) & (j + s <= end))
        return torch.stack(found, 1)

    def __call__(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens [B, L] -> (a false caption each [B, L], whether there is one [B])."""
        length = tokens.shape[1]
        possible = self.swaps(tokens).flatten(1)  # [B, S L L]
        lottery = torch.rand(possible.shape, generator=generator) * possible
        chosen = lottery.argmax(1)  # [B]
        span = chosen // length**2 + 1
        first, second = chosen // length % length, chosen % length  # [B]
        place = torch.arange(length)
        in_first = (place >= first[:, None]) & (place < (first + span)[:, None])  # [B, L]
        in_second = (place >= second[:, None]) & (place < (second + span)[:, None])
        shift = (second - first)[:, None]
        source = torch.where(in_first, place + shift, torch.where(in_second, place - shift, place))
        exists = possible.any(1)
        return tokens.gather(1, torch.where(exists[:, None], source, place)), exists


# ---- embeddings --------------------------------------------------------------------------------


def text_states(clip: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a prior conditions on (DALL-E 2, section 2.2): tokens [B, L] -> three tensors.

    Returns the text embedding [B, D] (unit norm), the text encoder's last states [B, L, W], and a
    mask [B, L] that is true from the start to the end of the text.
    """
    tower = cast(Any, getattr(clip, "text", clip))  # CustomTextCLIP keeps its tower apart
    x = tower.token_embedding(tokens) + tower.positional_embedding[: tokens.shape[1]]  # [B, L, W]
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))  # [B, L, W]
    end = tokens.argmax(1)  # [B], the end-of-text token has the highest number
    pooled = x[torch.arange(len(x), device=x.device), end]  # [B, W]
    projection = tower.text_projection
    embedding = projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
    mask = torch.arange(tokens.shape[1], device=x.device) <= end[:, None]  # [B, L]
    return F.normalize(embedding, dim=-1), x, mask
