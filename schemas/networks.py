"""Configs of the networks that we train: part of the training configs, and of every ModelCard."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class NetworkConfig(BaseModel):
    """Frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump()


class PriorConfig(NetworkConfig):
    """Size of the diffusion prior. The first three are taken from the encoder when training."""

    embed_dim: int = Field(64, description="D of the embeddings; taken from the encoder")
    state_dim: int = Field(64, description="width of the text encoder's states; taken from the encoder")
    context_length: int = Field(24, description="text tokens; taken from the encoder")
    width: int = Field(128, description="width of the transformer")
    head_width: int = Field(32, description="width of one attention head")
    layers: int = Field(4, description="transformer layers")
    use_states: bool = Field(True, description="condition on the text encoder's states beside the text embedding")
    timesteps: int = Field(1000, description="diffusion steps of the training schedule")


class DecoderConfig(NetworkConfig):
    """Size of the decoder, and how its training rows lose their condition. Sizes of data come from the tables."""

    image_size: int = Field(32, description="side of the pictures, pixels; taken from the images")
    patch_size: int = Field(8, description="side of one patch, pixels")
    embed_dim: int = Field(64, description="D of the embeddings; taken from the encoder")
    width: int = Field(160, description="width of the transformer")
    layers: int = Field(4, description="transformer blocks")
    head_width: int = Field(40, description="width of one attention head")
    trunk_width: int = Field(384, description="width of the condition")
    trunk_layers: int = Field(2, description="MLP layers that the condition passes through")
    use_text: bool = Field(True, description="condition on the text embedding as well")
    drop_image: float = Field(0.15, description="share of training rows without the image embedding")
    drop_text: float = Field(0.3, description="share of training rows without the text embedding")
    drop_both: float = Field(0.1, description="share of training rows without both, for guidance")
    blur: float = Field(0.0, description="largest noise on the whitened image embedding in training")
    time_mean: float = Field(0.3, description="t = sigmoid(N(mean, std))...")
    time_std: float = Field(1.1, description="its standard deviation")
    time_late: float = Field(0.45, description="share of times drawn uniformly in [0.8, 1] instead")
