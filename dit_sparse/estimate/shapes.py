"""The public models as far as their cost goes, from their published configurations."""

from __future__ import annotations

from dataclasses import dataclass

from dit_sparse.methods import nearest

__all__ = ["SHAPES", "ModelShape", "find_shape"]


@dataclass(frozen=True)
class ModelShape:
    """What a transformer's forward costs.

    Args:
        layers: transformer blocks, of all kinds.
        heads, dim: of self-attention; the hidden size is their product.
        weights: parameters of the transformers, all kept in memory.
        companions: parameters of text encoders and VAE.
        products: multiplications a token and layer in the linear layers, in units of the squared hidden size.
        stride: pixels and frames a token covers along frames, height and width.
        frame_groups: latent frames that one token covers.
        text: text tokens in the sequence of self-attention.
        cross: text tokens of a cross-attention; 0 without one.
        branches: forwards a step, or samples a batch, under guidance.
        batched: whether these are samples of one batch.
        transformers: of which each denoises some of the steps.
        fused: whether `sparsify` runs norms, modulation and residuals in one pass each.
    """

    layers: int
    heads: int
    dim: int
    weights: int
    companions: int
    products: float
    stride: tuple[int, int, int]
    frame_groups: int = 1
    text: int = 0
    cross: int = 0
    branches: int = 1
    batched: bool = True
    transformers: int = 1
    fused: bool = False

    @property
    def hidden(self) -> int:
        """Channels of a token."""
        return self.heads * self.dim

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Length of the sequence of self-attention.

        Raises:
            ValueError: a size that the model does not take.
        """
        for name, size, step in (("height", height, self.stride[1]), ("width", width, self.stride[2])):
            if size < 1 or size % step:
                raise ValueError(f"{name} must be a multiple of {step} for this model, got {size}")
        if self.stride[0] == 1 and frames != 1:
            raise ValueError(f"frames must be 1: this model makes single images, got {frames}")
        if frames < 1 or (frames - 1) % self.stride[0]:
            raise ValueError(f"frames must be a multiple of {self.stride[0]} plus 1 for this model, got {frames}")
        latents = (frames - 1) // self.stride[0] + 1
        grid = -(-latents // self.frame_groups) * (height // self.stride[1]) * (width // self.stride[2])
        return grid + self.text


def _wan(layers: int, heads: int, feed_forward: int, weights: int, **changes: object) -> ModelShape:
    hidden = heads * 128
    # Four products of self-attention, two of cross-attention for video tokens, two of the feed-forward layer.
    values: dict[str, object] = {
        "products": 6 + 2 * feed_forward / hidden,
        "companions": 5_680_000_000 + 127_000_000,
        "stride": (4, 16, 16),
        "cross": 512,
        "branches": 2,
        "batched": False,
        "fused": True,
    }
    return ModelShape(layers, heads, 128, weights, **(values | changes))  # type: ignore[arg-type]


def _cogvideox(layers: int, heads: int, weights: int, frame_groups: int = 1) -> ModelShape:
    companions = 4_760_000_000 + 216_000_000
    return ModelShape(layers, heads, 64, weights, companions, 12, (4, 16, 16), frame_groups, text=226, branches=2)


_FLUX = ModelShape(57, 24, 128, 11_901_408_320, 4_760_000_000 + 207_000_000, 12, (1, 16, 16), text=512)
SHAPES = {
    "wan2.1-1.3b": _wan(30, 12, 8960, 1_418_996_800),
    "wan2.1-14b": _wan(40, 40, 13824, 14_288_491_584),
    "wan2.2-5b": _wan(30, 24, 14336, 4_999_787_712, stride=(4, 32, 32), companions=6_380_000_000),
    "wan2.2-a14b": _wan(40, 40, 13824, 2 * 14_288_491_584, transformers=2),
    "cogvideox-2b": _cogvideox(30, 30, 1_693_783_872),
    "cogvideox-5b": _cogvideox(42, 48, 5_570_283_072),
    "cogvideox1.5-5b": _cogvideox(42, 48, 5_570_283_072, frame_groups=2),
    "hunyuanvideo": ModelShape(60, 24, 128, 12_821_012_544, 8_030_000_000 + 370_000_000, 12, (4, 16, 16), text=256),
    "flux.1-dev": _FLUX,
    "flux.1-schnell": _FLUX,
    "ltx-video": ModelShape(
        28, 32, 64, 1_923_385_472, 4_760_000_000 + 935_000_000, 14, (8, 32, 32), cross=128, branches=2
    ),
}


def find_shape(name: str) -> ModelShape:
    """The model called `name`, such as "wan2.1-14b", or the checkpoint of a preset.

    Raises:
        ValueError: an unknown name; the nearest and all known ones are named.
    """
    from dit_sparse.presets import find_preset

    preset = find_preset(name)
    shape = SHAPES.get(preset.name if preset is not None else name.lower())
    if shape is None:
        raise ValueError(f"unknown model {name!r}; {nearest(name.lower(), SHAPES)}")
    return shape
