"""The drop-in losses of images and texts against the originals in one process.

Over several workers and with accumulation: test_peer_faults.py and tests/end_to_end/test_open_clip_loop.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.loss import SigLipLoss as OpenSigLipLoss
from torch import Tensor
from torch.nn.functional import normalize

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


def test_wrong_world_size_is_said() -> None:
    with pytest.raises(ConfigError, match="world_size=2"):
        ClipLoss(world_size=2)(*leaves()[:3])
