"""The digest of weights, by its definition."""

import hashlib

import torch
from torch import nn

from pipeline.models.weights import weights_sha256


class Odd(nn.Module):
    """State of every kind: scalars, empty, not contiguous, half, integers, booleans."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.z = nn.Parameter(torch.randn(3, 4, generator=g).T)
        self.a = nn.Parameter(torch.tensor(2.5))
        for name, tensor in {
            "empty": torch.empty(0, 3),
            "narrow": torch.randn(5, generator=g).to(torch.bfloat16),
            "steps": torch.arange(4),
            "mask": torch.tensor([True, False]),
        }.items():
            self.register_buffer(name, tensor)


def test_digest_is_over_names_shapes_types_and_bytes() -> None:
    module = Odd()
    expected = hashlib.sha256()
    for name in ("a", "empty", "mask", "narrow", "steps", "z"):
        tensor = module.state_dict()[name]
        flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        expected.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        expected.update(flat.view(torch.int16).numpy().tobytes() if name == "narrow" else flat.numpy().tobytes())
    assert weights_sha256(module) == expected.hexdigest()


def test_any_bit_name_or_shape_counts() -> None:
    digests = {weights_sha256(Odd())}
    for change in ("bit", "shape"):
        module = Odd()
        if change == "bit":
            module.mask[1] = True
        else:
            module.z = nn.Parameter(module.z.detach().T)
        digests.add(weights_sha256(module))
    assert len(digests) == 3
