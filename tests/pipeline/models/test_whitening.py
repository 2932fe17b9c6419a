"""Whitening against numpy's covariance."""

import numpy as np
import pytest
import torch

from pipeline.models.whitening import Whitening


@pytest.fixture
def vectors() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    mixed = torch.randn(500, 6, generator=g) @ torch.randn(6, 6, generator=g) + 3.0
    return mixed.double().float()


def test_whitened_vectors_have_unit_covariance(vectors: torch.Tensor) -> None:
    z = Whitening(6).fit(vectors, floor=1e-9)(vectors).numpy()
    np.testing.assert_allclose(np.cov(z.T), np.eye(6), atol=1e-3)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)


def test_inverse_undoes_it(vectors: torch.Tensor) -> None:
    w = Whitening(6).fit(vectors)
    torch.testing.assert_close(w.inverse(w(vectors)), vectors, atol=1e-4, rtol=1e-4)


def test_floor_keeps_noise_small() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1000, 2, generator=g) * torch.tensor([1.0, 1e-4])
    z = Whitening(2).fit(x, floor=1e-2)(x)
    assert float(z[:, 1].std()) == pytest.approx(1e-4 / 1e-1, rel=0.1)  # s = sqrt(0.01 * 1)


def test_travels_with_the_weights(vectors: torch.Tensor) -> None:
    fitted, other = Whitening(6).fit(vectors), Whitening(6)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other(vectors), fitted(vectors))


def test_refuses_another_dimension() -> None:
    with pytest.raises(ValueError, match="dimensions"):
        Whitening(4).fit(torch.randn(10, 5))
