"""The drop-in losses of images and texts against the originals in one process.

Over several workers and with accumulation: test_peer_faults.py and tests/end_to_end/test_open_clip_loop.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.loss import SigLipLoss as OpenSigLipLoss
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.sweep import Tiling
from cl.errors import ConfigError
from cl.losses import ClipLoss, SigLipLoss
from tests.distributed.pool import gradient

Leaves = list[Tensor]


def leaves(rows: slice = slice(None)) -> Leaves:
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(12, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    scale, bias = torch.tensor(11.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    return [leaf.clone().requires_grad_() for leaf in (image[rows], text[rows], scale, bias)]


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "nonscalar_logit_scale"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(ClipLoss(), OpenClipLoss()), (SigLipLoss(), OpenSigLipLoss())], ids=["clip", "siglip"]
)
def test_equals_the_original_in_one_process(
    ours: torch.nn.Module, theirs: torch.nn.Module, shape: tuple[int, ...]
) -> None:
    mine, original = leaves(), leaves()
    loss, expected = (
        loss(image, text, scale.view(shape), bias.view(shape))
        for loss, (image, text, scale, bias) in ((ours, mine), (theirs, original))
    )
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected.view(()), rtol=1e-12, atol=0)
    for found, leaf in zip(mine, original, strict=True):
        torch.testing.assert_close(gradient(found), gradient(leaf), rtol=1e-10, atol=1e-13)
    assert ours(*leaves(), output_dict=True).keys() == {"contrastive_loss"}


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_evaluates_without_gradients(grad: Any) -> None:
    with grad():
        for ours, theirs in [(ClipLoss(), OpenClipLoss()), (SigLipLoss(), OpenSigLipLoss())]:
            torch.testing.assert_close(ours(*leaves()), theirs(*leaves()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_types_round_embeddings_but_not_logits(kind: torch.dtype) -> None:
    """open_clip rounds scale x similarity to the half type; the drop-in equals the formula on the same embeddings."""
    image, text = (leaf.detach().to(kind) for leaf in leaves()[:2])
    scale, bias = (leaf.detach().float() for leaf in leaves()[2:])
    for ours, theirs in [(ClipLoss(), OpenClipLoss()), (SigLipLoss(), OpenSigLipLoss())]:
        expected = theirs(image.double(), text.double(), scale.double(), bias.double())
        with torch.autocast("cpu", kind):
            found, original = ours(image, text, scale, bias), theirs(image, text, scale, bias)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
        assert abs(original - expected) > 100 * abs(found - expected)


def embeddings(kind: str) -> tuple[Tensor, Tensor]:
    """512 pairs in bfloat16: at random, found by a trained model, or all in nearly one direction."""
    generator = torch.Generator().manual_seed(0)
    image, noise = (normalize(torch.randn(512, 64, generator=generator), dim=1) for _ in range(2))
    if kind == "collapsed":
        image, noise = (normalize(image[:1] + 0.1 * each, dim=1) for each in (image, noise))
    text = normalize(image + 0.5 * noise, dim=1) if kind == "trained" else noise
    return image.bfloat16(), text.bfloat16()


def sure_formula(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss as log(1 + sum of exp(s_ij - s_ii) over the others), in which nothing cancels."""
    scores = scale * image @ text.T
    own = scores.diagonal()
    others = scores.masked_fill(torch.eye(len(image), dtype=torch.bool), -torch.inf)
    gaps = torch.stack([others.logsumexp(1) - own, others.logsumexp(0) - own])
    return torch.logaddexp(gaps, torch.zeros_like(gaps)).mean()


def slopes(loss: Callable[..., Tensor], views: tuple[Tensor, Tensor], dtype: torch.dtype, *numbers: float) -> Leaves:
    """Loss and gradients at the same embeddings in another type."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    mine = [view.to(dtype, copy=True).requires_grad_() for view in views]
    mine += [torch.tensor(number, dtype=kind, requires_grad=True) for number in numbers]
    value = loss(*mine)
    value.backward()
    return [value.detach().double(), *(gradient(leaf).double() for leaf in mine[:2])]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("kind", ["random", "trained", "collapsed"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_bfloat16_is_nearer_to_float64_than_the_originals(name: str, kind: str, scale: float) -> None:
    """Logits are not rounded, sums are float32; what remains is the rounding of slopes and of the result.

    The tiles are small, so that most gradients are sums over several products that were rounded.
    """
    choices: dict[str, Any] = {
        "clip": (ClipLoss(), OpenClipLoss(), sure_formula, (scale,)),
        "siglip": (SigLipLoss(), OpenSigLipLoss(), OpenSigLipLoss(), (scale, -10.0)),
    }
    ours, theirs, reference, numbers = choices[name]
    ours.tiling = Tiling(64, 128)
    views = embeddings(kind)
    expected = slopes(reference, views, torch.float64, *numbers)
    mine = slopes(ours, views, torch.bfloat16, *numbers)
    original = slopes(theirs, views, torch.bfloat16, *numbers)
    assert error(mine[0], expected[0]) < 1e-5
    for found, other, exact in zip(mine[1:], original[1:], expected[1:], strict=True):
        # No result in bfloat16 can be nearer than its own rounding.
        assert error(found, exact) <= max(error(other, exact), 2**-8)


def test_a_sure_model_still_has_a_gradient() -> None:
    """At a loss of 1e-20 float32's softmax of the own pair is 1 and its slope 0; the slopes must keep their digits."""
    image, _ = embeddings("random")
    text = normalize(image.double() + 0.01, dim=1).float()
    views = image.float(), text
    expected = slopes(sure_formula, views, torch.float64, 100.0)
    assert expected[0] < 1e-10
    for found, exact in zip(slopes(ClipLoss(), views, torch.float32, 100.0), expected, strict=True):
        assert error(found, exact) < 1e-4


def test_wrong_world_size_is_said() -> None:
    with pytest.raises(ConfigError, match="world_size=2"):
        ClipLoss(world_size=2)(*leaves()[:3])
