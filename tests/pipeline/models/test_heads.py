"""Heads against torch modules with the same weights, and by hand; what makes no head."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models.heads import load_head, save_head
from schemas.cards import EncoderCard
from schemas.errors import EncoderMismatch, UsageError

D = 24
CARD = EncoderCard(
    model="tiny", pretrained="p", weights_sha256="ab" * 32, dim=D, image_size=16, mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5), interpolation="bicubic", resize_mode="shortest", context_length=12, dtype="float32",
)  # fmt: skip


def vectors(n: int = 50, dim: int = D) -> Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(1)), dim=-1)


def save(path: Path, tensors: dict[str, Tensor], **metadata: str) -> str:
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, metadata or None)
    return f"score={path}"


def check(spec: str, module: nn.Module, dim: int = D) -> None:
    """The head gives what the module gives."""
    x = vectors(dim=dim)
    with torch.inference_mode():
        expected = module.eval()(x)[:, 0].numpy()
    found = load_head(spec)(x.numpy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


class InLayers(nn.Module):
    """A Sequential under the name that LAION's files give it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def with_relu(*widths: int, last: bool) -> list[nn.Module]:
    """Linear, ReLU, Dropout, ...; before the last layer a ReLU without dropout, or nothing."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(a, b))
        if i < len(widths) - 3:
            layers += [nn.ReLU(), nn.Dropout(0.2)]
        elif i == len(widths) - 3 and last:
            layers.append(nn.ReLU())
    return layers


class Standardised(nn.Module):
    """LAION's NSFW detectors for ViT-B-32 and ViT-L-14, with dense layers of these widths."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.randn(widths[0]) * 0.1)
        self.norm.register_buffer("variance", torch.rand(widths[0]) * 0.1 + 0.01)
        self.depth = len(widths) - 1
        for i, (a, b) in enumerate(pairwise(widths)):
            setattr(self, f"linear_{i + 1}", nn.Linear(a, b))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.norm.mean) / (self.norm.variance.sqrt() + 1e-10)
        for i in range(1, self.depth):
            x = F.relu(getattr(self, f"linear_{i}")(x))
        return torch.sigmoid(getattr(self, f"linear_{self.depth}")(x))


def test_one_linear_layer_by_hand(tmp_path: Path) -> None:
    weight = torch.zeros(1, D)
    weight[0, 3] = 2.0
    spec = save(tmp_path / "a.safetensors", {"weight": weight, "bias": torch.tensor([0.5])})
    head = load_head(spec)
    assert (head.name, head.dim, head.encoder) == ("score", D, "")
    np.testing.assert_allclose(head(np.eye(D, dtype=np.float32)[[3, 4]]), [2.5, 0.5])
    bare = save(tmp_path / "b.safetensors", {"weight": weight})
    np.testing.assert_allclose(load_head(bare)(np.eye(D, dtype=np.float32)[[3, 4]]), [2.0, 0.0])
    assert load_head(bare)(np.empty((0, D), np.float32)).shape == (0,)


MODULES = {
    "improved aesthetic predictor": lambda: InLayers(
        nn.Linear(D, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    ),
    "the same with relu": lambda: InLayers(*with_relu(D, 1024, 128, 64, 16, 1, last=True)),
    "NSFW H-14": lambda: InLayers(*with_relu(D, 1024, 2048, 1024, 256, 128, 16, 1, last=False)),
    "NSFW B-32": lambda: Standardised(D, 32, 32, 1),
    "NSFW L-14": lambda: Standardised(D, 64, 512, 256, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_laions_heads_are_known_by_their_tensors(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = MODULES[name]()
    spec = save(tmp_path / "head.safetensors", module.state_dict())
    check(spec, module)


def test_an_mlp_says_its_activation(tmp_path: Path) -> None:
    torch.manual_seed(4)
    for activation, layer in (("relu", nn.ReLU()), ("gelu", nn.GELU()), ("none", nn.Identity())):
        # Ten layers: "10" must come after "9".
        linear = [nn.Linear(D, D) for _ in range(10)] + [nn.Linear(D, 1)]
        module = nn.Sequential(*[m for one in linear[:-1] for m in (one, layer)], linear[-1])
        tensors = {f"net.{i}.{k}": v for i, one in enumerate(linear) for k, v in one.state_dict().items()}
        check(save(tmp_path / f"{activation}.safetensors", tensors, activation=activation), module)
    with pytest.raises(UsageError, match="activation"):
        load_head(save(tmp_path / "silent.safetensors", tensors))
    with pytest.raises(UsageError, match="activation"):
        load_head(save(tmp_path / "other.safetensors", tensors, activation="swish"))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(5)
    first, second = nn.Linear(D, 7), nn.Linear(7, 1)
    path = tmp_path / "own.safetensors"
    save_head(
        path, [(first.weight, first.bias), (second.weight, second.bias)],
        activation="gelu", output="sigmoid", encoder=CARD.id,
    )  # fmt: skip
    check(f"score={path}", nn.Sequential(first, nn.GELU(), second, nn.Sigmoid()))
    head = load_head(f"score={path}", CARD)
    copy = pickle.loads(pickle.dumps(head))
    np.testing.assert_array_equal(copy(vectors().numpy()), head(vectors().numpy()))
    with pytest.raises(UsageError):
        save_head(path, [(first.weight, first.bias)])  # gives seven numbers


def test_blocks_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = load_head(save(tmp_path / "a.safetensors", {"weight": torch.randn(1, D)}))
    whole = head(vectors(10).numpy())
    monkeypatch.setattr("pipeline.models.heads._BLOCK", 3)
    np.testing.assert_allclose(head(vectors(10).numpy()), whole, rtol=1e-6)


@pytest.mark.parametrize(("encoder", "fits"), [(CARD.id, True), (CARD.weights_sha256, True), ("other-1234", False)])
def test_the_encoder_is_checked(tmp_path: Path, encoder: str, fits: bool) -> None:
    spec = save(tmp_path / "a.safetensors", {"weight": torch.ones(1, D)}, encoder=encoder)
    if fits:
        load_head(spec, CARD)
    else:
        with pytest.raises(EncoderMismatch, match="other-1234"):
            load_head(spec, CARD)


def test_vectors_of_another_length(tmp_path: Path) -> None:
    spec = save(tmp_path / "a.safetensors", {"weight": torch.ones(1, D + 1)})
    with pytest.raises(UsageError, match=f"D={D}\n.*D={D + 1}"):
        load_head(spec, CARD)
    with pytest.raises(UsageError):
        load_head(spec)(vectors().numpy())


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (ran,)

    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"weight": torch.ones(1, D)}, tmp_path / "zip.pth")
    torch.save({"weight": torch.ones(1, D)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("plain.pth", "zip.pth", "old.pth"):
        with pytest.raises(UsageError, match=r"a pickle(.|\n)*remedy: convert"):
            load_head(f"a={tmp_path / name}")
    assert not ran.exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"weight": torch.ones(2, D)},
        {"weight": torch.ones(D)},
        {"weight": torch.ones(1, D), "bias": torch.ones(2)},
        {"0.weight": torch.ones(5, D), "1.weight": torch.ones(1, 6)},
        {"weight": torch.ones(1, D), "scale": torch.ones(1)},
        {"weight": torch.ones(1, D), "norm.mean": torch.ones(D)},
        {"weight": torch.ones(1, D), "norm.mean": torch.ones(1), "norm.variance": torch.ones(1)},
        {"weight": torch.full((1, D), torch.nan)},
    ],
    ids=["none", "two outputs", "a vector", "bias", "chain", "unknown", "half a norm", "another norm", "NaN"],
)
def test_tensors_that_make_no_head(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError):
        load_head(save(tmp_path / "a.safetensors", tensors, activation="none"))


@pytest.mark.parametrize("spec", ["a.safetensors", "=a.safetensors", "a b=c", "a=", "1a=b", "a=/no/such/file"])
def test_what_names_no_head(spec: str) -> None:
    with pytest.raises(UsageError):
        load_head(spec)
