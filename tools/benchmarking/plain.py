# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the project computes, written once more from the formulas without any trick; the benchmark's yardstick.

Each piece takes the weights of the piece it repeats, so both must give the same numbers: the benchmark checks that
before it times them. The U-Net is also built from the package ``dynamic-network-architectures``, if that is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import comb, exp
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch import Tensor, nn

from common.methods.models_genesis import GenesisDraw
from common.networks import Primus, ResEncUNet, Transformer
from common.networks.blocks.sparse import MaskedMap
from common.views import SpatialDraw

__all__ = [
    "LOSSES",
    "DenseUNet",
    "PeerUNet",
    "PlainPrimus",
    "PlainSpark3D",
    "PlainTransformer",
    "PlainUNet",
    "distort",
    "plain_method",
    "resample",
]

# networks


def masked_norm(x: Tensor, seen: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Instance norm over visible voxels in two passes of plain autograd."""
    count = seen.sum((2, 3, 4), keepdim=True)
    mean = (x * seen).sum((2, 3, 4), keepdim=True) / count
    variance = ((x - mean) ** 2 * seen).sum((2, 3, 4), keepdim=True) / count
    x = (x - mean) / torch.sqrt(variance + 1e-5)
    if weight is not None and bias is not None:
        x = x * weight[:, None, None, None] + bias[:, None, None, None]
    return x * seen


def spread(visible: Tensor, size: torch.Size) -> Tensor:
    """Repeat a grid of blocks ``(B, d, h, w)`` to a map ``(B, 1, D, H, W)``."""
    seen = visible[:, None].float()
    for axis in (2, 3, 4):
        seen = seen.repeat_interleave(size[axis - 2] // seen.shape[axis], axis)
    return seen


def unit(layer: Any, x: Tensor, seen: Tensor | None = None) -> Tensor:
    """Convolution, norm and, where the layer has one, activation."""
    x = layer.conv(x)
    if seen is None:
        x = torch.instance_norm(x, layer.norm.weight, layer.norm.bias, None, None, True, 0.1, 1e-5, True)
    else:
        x = masked_norm(x, seen, layer.norm.weight, layer.norm.bias)
    return F.leaky_relu(x, 0.01, inplace=True) if isinstance(layer.activation, nn.LeakyReLU) else x


class PlainUNet(nn.Module):
    """The residual-encoder U-Net with the interface of a backbone."""

    def __init__(self, ours: ResEncUNet) -> None:
        super().__init__()
        self.net: Any = copy.deepcopy(ours)
        self.levels = len(ours.encoder.stages)

    def stem(self, image: Tensor, seen: Tensor | None) -> Tensor:
        """Map the image to the first features."""
        return unit(self.net.encoder.stem, image, seen)

    def stage(self, level: int, x: Tensor, seen: Tensor | None) -> Tensor:
        """Compute the residual blocks of a stage."""
        block: Any
        for block in self.net.encoder.stages[level]:
            shortcut = block.pool(x)
            if block.shortcut is not None:
                shortcut = unit(block.shortcut, shortcut, seen)
            x = F.leaky_relu(unit(block.conv2, unit(block.conv1, x, seen), seen) + shortcut, 0.01, inplace=True)
        return x

    def encode(
        self,
        image: Tensor,
        visible: Tensor | None = None,
        mask_token: Tensor | None = None,
        sparse: bool = False,
        visible_count: int | None = None,
    ) -> list[Tensor]:
        """Return the feature maps, fine to coarse."""
        if visible is not None:
            image = image * spread(visible, image.shape[2:])

        def seen(level: int) -> Tensor | None:
            size = torch.Size(side >> level for side in image.shape[2:])
            return spread(visible, size) if sparse and visible is not None and size[0] >= visible.shape[1] else None

        x = self.stem(image, seen(0))
        if mask_token is not None and visible is not None:
            x = torch.where(spread(visible, image.shape[2:]) > 0, x, mask_token)
        features = []
        for level in range(self.levels):
            x = self.stage(level, x, seen(level))
            features.append(x)
        return features

    def encode_visible(self, image: Tensor, visible: Tensor, **known: Any) -> list[MaskedMap]:
        """Return the feature maps of visible voxels; what else is ``known`` of them saves nothing here."""
        return [MaskedMap(x, None) for x in self.encode(image, visible, sparse=True)]

    def decode(self, features: list[Tensor]) -> Tensor:
        """Map the feature maps to the output."""
        decoder = self.net.decoder
        x = features[-1]
        for upsampling, stage, skip in zip(decoder.upsamplings, decoder.stages, features[-2::-1], strict=True):
            x = unit(stage, torch.cat([upsampling(x), skip], 1))
        return self.net.head(x)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image to the output."""
        return self.decode(self.encode(image))


class PeerUNet(PlainUNet):
    """The same from ``dynamic-network-architectures``; it cannot be sparse."""

    def __init__(self, ours: ResEncUNet) -> None:
        nn.Module.__init__(self)
        self.levels = len(ours.encoder.stages)
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

        stages = len(ours.feature_channels)
        peer = ResidualEncoderUNet(
            input_channels=ours.encoder.stem.conv.in_channels,
            n_stages=stages,
            features_per_stage=ours.feature_channels,
            conv_op=nn.Conv3d,
            kernel_sizes=3,
            strides=[1, *[2] * (stages - 1)],
            n_blocks_per_stage=[len(stage) for stage in ours.encoder.stages],  # type: ignore[arg-type]
            num_classes=1 if ours.head is None else ours.head.out_channels,
            n_conv_per_stage_decoder=[1] * (stages - 1),
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )
        parts: list[Any] = [peer.encoder]
        if ours.decoder is not None:
            parts += [peer.decoder.transpconvs, peer.decoder.stages, peer.decoder.seg_layers[-1]]
        self.net = nn.ModuleList(parts)
        with torch.no_grad():
            for theirs, mine in zip(self.net.parameters(), ours.parameters(), strict=True):
                theirs.copy_(mine)

    def stem(self, image: Tensor, seen: Tensor | None) -> Tensor:
        """Map the image to the first features."""
        return self.net[0].stem(image)

    def stage(self, level: int, x: Tensor, seen: Tensor | None) -> Tensor:
        """Compute the residual blocks of a stage."""
        return self.net[0].stages[level](x)

    def encode(self, image: Tensor, *arguments: Any, **settings: Any) -> list[Tensor]:
        """Return the feature maps, fine to coarse."""
        if settings.get("sparse"):
            raise ValueError("the peer has no sparse encoder")
        return super().encode(image, *arguments, **settings)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Map the feature maps to the output."""
        x = features[-1]
        _, upsamplings, stages, head = self.net
        for upsampling, stage, skip in zip(upsamplings, stages, features[-2::-1], strict=True):
            x = stage(torch.cat([upsampling(x), skip], 1))
        return head(x)


class PlainTransformer(nn.Module):
    """Transformer whose attention is an explicit softmax and whose rotary positions are computed in every block."""

    def __init__(self, ours: Transformer) -> None:
        super().__init__()
        self.net = copy.deepcopy(ours)

    def forward(self, grid: Tensor, visible: Tensor | None = None) -> Tensor:
        """Map a grid of tokens ``(B, C, d, h, w)`` to another; hidden ones are left out and come back as zeros."""
        b, c, *sides = grid.shape
        position: Tensor = self.net.position_embedding
        if position.shape[2:] != grid.shape[2:]:
            position = F.interpolate(position, size=sides, mode="trilinear")
        x = (grid + position).flatten(2).transpose(1, 2)  # (B, N, C)
        axes = [torch.arange(side, device=grid.device, dtype=torch.float32) for side in sides]
        place = torch.cartesian_prod(*axes).expand(b, -1, 3)  # (B, N, 3)
        if visible is not None:
            x = torch.stack([sample[seen.flatten()] for sample, seen in zip(x, visible, strict=True)])
            place = torch.stack([sample[seen.flatten()] for sample, seen in zip(place, visible, strict=True)])
        for block in self.net.blocks:
            x = self._block(block, x, place)
        x = self.net.norm(x)
        if visible is not None:
            full = x.new_zeros(b, grid[0, 0].numel(), c)
            full[visible.flatten(1)] = x.flatten(0, 1)
            x = full
        return x.transpose(1, 2).reshape(grid.shape)

    def _block(self, block: Any, x: Tensor, place: Tensor) -> Tensor:
        def dropped(branch: Tensor) -> Tensor:
            rate = block.drop_path.rate
            if rate == 0 or not self.training:
                return branch
            keep = torch.empty(len(x), 1, 1, dtype=branch.dtype, device=x.device).bernoulli_(1 - rate)
            return branch * keep / (1 - rate)

        part = block.attention
        normed = block.norm1(x)
        q, k, v = (
            layer(normed).unflatten(2, (part.num_heads, -1)).transpose(1, 2)
            for layer in (part.query, part.key, part.value)
        )
        weights = (self._turn(q, place) @ self._turn(k, place).mT / q.shape[-1] ** 0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        x = x + dropped(block.scale1 * part.output(part.norm(mixed)))
        part = block.mlp
        normed = block.norm2(x)
        gated = part.norm(F.silu(part.gate(normed)) * part.value(normed))
        return x + dropped(block.scale2 * part.output(gated))

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        """Rotate channel pairs: a third of them with each axis."""
        bands = x.shape[-1] // 6
        frequency = 10000.0 ** (-torch.arange(bands, device=x.device) / bands)
        angle = (place[..., None] * frequency).flatten(2)[:, None]  # (B, 1, N, head_dim / 2)
        even, odd = x[..., 0::2], x[..., 1::2]
        sine, cosine = angle.sin(), angle.cos()
        return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2).to(x.dtype)


class PlainPrimus(nn.Module):
    """Primus with the interface of a backbone."""

    def __init__(self, ours: Primus) -> None:
        super().__init__()
        self.patches = copy.deepcopy(ours.encoder.patch_embedding)
        self.transformer = PlainTransformer(ours.encoder.transformer)
        self.decoder = copy.deepcopy(ours.decoder)

    def encode(
        self,
        image: Tensor,
        visible: Tensor | None = None,
        mask_token: Tensor | None = None,
        sparse: bool = False,
        visible_count: int | None = None,
    ) -> list[Tensor]:
        """Return the grid of tokens."""
        grid = self.patches(image)
        if mask_token is not None and visible is not None:
            grid, visible = torch.where(visible[:, None], grid, mask_token.to(grid.dtype)), None
        return [self.transformer(grid, visible)]

    def encode_visible(self, image: Tensor, visible: Tensor, **known: Any) -> list[MaskedMap]:
        """Return the grid of tokens, hidden ones left out; what else is ``known`` of them saves nothing here."""
        return [MaskedMap(x, None) for x in self.encode(image, visible)]

    def decode(self, features: list[Tensor]) -> Tensor:
        """Map the grid of tokens to the output."""
        return self.decoder(features[-1])  # type: ignore[misc]

    def forward(self, image: Tensor) -> Tensor:
        """Map an image to the output."""
        return self.decode(self.encode(image))


class PlainSpark3D(nn.Module):
    """Spark3D on a plain backbone."""

    def __init__(self, ours: Any, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.strides = ours.backbone.feature_strides
        self.mask_tokens = copy.deepcopy(ours.mask_tokens)
        self.projections = copy.deepcopy(ours.projections)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to the reconstruction."""
        visible = ~batch["hidden"]
        dense = []
        features: list[Tensor] = self.backbone.encode(batch["image"], visible=visible, sparse=True)  # type: ignore[operator]
        for level, (x, projection) in enumerate(zip(features, self.projections, strict=True)):
            if x.shape[2] < visible.shape[1]:
                x = masked_norm(x, torch.ones_like(x[:, :1]))
            else:
                seen = spread(visible, x.shape[2:])
                x = masked_norm(x, seen) + self.mask_tokens[level] * (1 - seen)
            dense.append(projection(x))
        return {"reconstruction": self.backbone.decode(dense)}  # type: ignore[operator]


class DenseUNet(nn.Module):
    """Our own U-Net on the image with its hidden blocks set to 0, nothing else: what Spark3D is compared with."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(ours.backbone)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to the reconstruction."""
        features = self.backbone.encode(batch["image"], visible=~batch["hidden"])
        return {"reconstruction": self.backbone.decode(features)}


def plain_method(method: Any, *, peer: bool) -> nn.Module:
    """Return the same method on a plain copy of its backbone.

    Args:
        method: of a bundle.
        peer: take the U-Net of dynamic-network-architectures, where the method is not sparse.
    """
    kind = type(method).__name__
    if isinstance(method.backbone, ResEncUNet):
        sparse = kind in ("Spark3D", "JEPA")
        backbone: nn.Module = PeerUNet(method.backbone) if peer and not sparse else PlainUNet(method.backbone)
    else:
        backbone = PlainPrimus(method.backbone)
    if kind == "Spark3D":
        return PlainSpark3D(method, backbone)
    plain = copy.deepcopy(method)
    plain.backbone = backbone
    if getattr(plain, "student", None) is not None:
        plain.student = backbone.requires_grad_(True)
        plain.backbone = copy.deepcopy(backbone).requires_grad_(False)
    for name in ("decoder", "predictor"):
        if isinstance(getattr(plain, name, None), Transformer):
            setattr(plain, name, PlainTransformer(getattr(plain, name)))
    return plain  # type: ignore[no-any-return]


# losses: functions of (our loss, predictions, views)


def _masked(loss: Any, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    hidden = spread(batch["hidden"], batch["image"].shape[2:]) > 0
    return ((pred["reconstruction"].float() - batch["image"]) ** 2)[hidden].mean()


def _restoration(loss: Any, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    return ((pred["reconstruction"].float() - batch["target"]) ** 2).mean()


def _contrast(embeddings: Tensor, temperature: float) -> Tensor:
    views = list(embeddings.float().flatten(0, 1))
    count, total = len(views), torch.zeros((), device=embeddings.device)
    for i in range(count):
        likeness = [torch.cosine_similarity(views[i], views[j], dim=0) / temperature for j in range(count)]
        others = torch.stack([likeness[j] for j in range(count) if j != i])
        total = total - likeness[(i + count // 2) % count] + others.exp().sum().log()
    return total / count


def _simclr(loss: Any, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    return _contrast(pred["embedding"], loss.contrast.temperature)


def _swinunetr(loss: Any, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    restored = (pred["reconstruction"].float() - batch["target"]).abs().mean()
    turned = F.cross_entropy(pred["rotation"].float(), batch["rotation"])
    return restored + turned + _contrast(pred["embedding"], loss.contrast.temperature)


def _voco(loss: Any, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    near, near_weight, far, far_weight, alike = (torch.zeros((), device=batch["overlap"].device) for _ in range(5))
    for overlap, base, target in zip(batch["overlap"], pred["base"].float(), pred["target"].float(), strict=True):
        for shares, t in zip(overlap, target, strict=True):
            for share, g in zip(shares, base, strict=True):
                predicted = torch.cosine_similarity(t, g.detach(), dim=0).relu()
                near = near - share * (1 - (share - predicted).abs() + 1e-6).log()
                near_weight = near_weight + share
                far_weight = far_weight + (share == 0) + 1e-6
                far = far + predicted**2 * (share == 0)
        pairs = [(i, j) for i in range(len(base)) for j in range(i)]
        alike = alike + sum(torch.cosine_similarity(base[i], base[j], dim=0).relu() for i, j in pairs) / len(pairs)
    return near / near_weight + far / far_weight + alike / len(batch["overlap"])


def _fusion(loss: Any, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    logits, share = pred["logits"].float(), batch["share"]
    truth = F.one_hot(share, logits.shape[1]).movedim(-1, 1).float()
    probability = logits.softmax(1)
    axes = (2, 3, 4)
    dice = (2 * (probability * truth).sum(axes) + 1e-5) / (truth.sum(axes) + probability.sum(axes) + 1e-5)
    return F.cross_entropy(logits, share) - dice.mean()


def _shared_out(cosines: Tensor, temperature: float) -> Tensor:
    shares = torch.exp(cosines / temperature)
    for _ in range(3):
        shares = torch.stack([column / column.sum() for column in shares.unbind(1)], dim=1)
        shares = torch.stack([row / row.sum() for row in shares])
    return shares


def _dino(loss: Any, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    first, last = loss.teacher_temperature
    temperature = first + (last - first) * min(batch["progress"] / loss.temperature_warmup, 1)
    teacher, student = pred["teacher"].float(), pred["student"].float() / loss.student_temperature
    targets = _shared_out(teacher.flatten(0, 1), temperature).view(teacher.shape)
    crops = [F.cross_entropy(student[:, s], targets[:, t]) for t in range(2) for s in range(student.shape[1]) if s != t]
    dense = _shared_out(pred["teacher_dense"].float().flatten(0, 1), temperature)
    blocks = F.cross_entropy(pred["student_dense"].float().flatten(0, 1) / loss.student_temperature, dense)
    total = torch.stack(crops).mean() + loss.dense_weight * blocks
    for crop in range(2):
        units = [row / row.norm() for row in pred["pooled"][:, crop].float()]
        for i, one in enumerate(units):
            near = torch.stack([(one - other).norm() for j, other in enumerate(units) if j != i]).min()
            total = total - loss.koleo_weight * near.log() / (2 * len(units))
    return total


def _isotropy(features: Tensor, seed: int, count: int) -> Tensor:
    drawn = torch.randn(features.shape[-1], count, generator=torch.Generator().manual_seed(seed)).to(features.device)
    rows, total = features.float().flatten(0, 1), torch.zeros((), device=features.device)
    for direction in drawn.unbind(1):
        along = rows @ (direction / direction.norm())
        heights = []
        for index in range(-8, 9):
            t = 5 * index / 8
            normal = exp(-t * t / 2)
            heights.append((((t * along).cos().mean() - normal) ** 2 + (t * along).sin().mean() ** 2) * normal)
        total = total + torch.trapezoid(torch.stack(heights), dx=5 / 8) / count
    return total


def _jepa(loss: Any, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    total = F.mse_loss(pred["prediction"].float(), pred["target"].float())
    if loss.isotropy_weight == 0:
        return total
    learned = ["context"] if loss.with_teacher else ["context", "target"]
    for name in learned:
        spread = _isotropy(pred[name], batch["seed"], loss.directions)
        total = total + loss.isotropy_weight * spread / len(learned)
    return total


LOSSES: dict[str, Callable[[Any, dict[str, Tensor], dict[str, Any]], Tensor]] = {
    "MaskedMSELoss": _masked,
    "MAELoss": _masked,
    "RestorationLoss": _restoration,
    "SimCLRLoss": _simclr,
    "SwinUNETRLoss": _swinunetr,
    "VoCoLoss": _voco,
    "FusionLoss": _fusion,
    "DINOLoss": _dino,
    "JEPALoss": _jepa,
}

# views


def resample(volume: np.ndarray, draw: SpatialDraw, size: tuple[int, int, int], *, order: int = 3) -> np.ndarray:
    """Cut a crop out of the whole volume by splines of an order; cubic ones as the reference uses."""
    if draw.matrix is None:
        crop = np.zeros(size, np.float32)
        into = tuple(slice(a - low, b - low) for a, b, low in zip(draw.start, draw.stop, draw.low, strict=True))
        crop[into] = volume[tuple(slice(a, b) for a, b in zip(draw.start, draw.stop, strict=True))]
    else:
        half = (np.array(size) - 1) / 2
        offset = (
            np.stack(np.meshgrid(*[np.arange(side) for side in size], indexing="ij")).reshape(3, -1) - half[:, None]
        )
        where = np.array(draw.matrix) @ offset + (np.array(draw.low) + half)[:, None]
        crop = map_coordinates(volume, where, order=order, mode="grid-constant").reshape(size)
    return np.flip(crop, tuple(axis for axis, flip in enumerate(draw.flips) if flip)).astype(np.float32)


def distort(crop: np.ndarray, draw: GenesisDraw, rng: np.random.Generator) -> np.ndarray:
    """Spoil a crop as Models Genesis' own code does: a loop over boxes, a search in a curve of 100,000 points.

    How much is spoiled follows from the draw; the shuffled boxes are drawn anew, each when its turn comes.
    """
    image = crop.copy()
    size = np.array(crop.shape)
    for _ in range(len(draw.shuffled)):
        sides = rng.integers(1, size // 10 + 1)
        box = _box(rng.integers(0, size - sides + 1), sides)
        window = crop[box].flatten()
        rng.shuffle(window)
        image[box] = window.reshape(sides)
    if draw.curve is not None:
        t = np.linspace(0, 1, 100_000)
        bernstein = np.array([comb(3, i) * t**i * (1 - t) ** (3 - i) for i in range(4)])
        before, after = draw.curve.T @ bernstein
        image = np.interp(image, before, after)
    for low, sides in draw.inpainted:
        image[_box(low, sides)] = rng.random(sides)
    if len(draw.kept):
        whole, image = image, rng.random(crop.shape)
        for box in (_box(low, sides) for low, sides in draw.kept):
            image[box] = whole[box]
    return image.astype(np.float32)


def _box(low: np.ndarray, sides: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(low, sides, strict=True))
