"""The drop-in losses against the originals: equal in one process; exact where the originals' gradients are not."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.loss import SigLipLoss as OpenSigLipLoss
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.errors import ConfigError
from cl.losses import ClipLoss, SigLipLoss
from tests.distributed.pool import Pool, gradient

Leaves = list[Tensor]


def leaves(rows: slice = slice(None)) -> Leaves:
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(12, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    scale, bias = torch.tensor(11.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    return [leaf.clone().requires_grad_() for leaf in (image[rows], text[rows], scale, bias)]


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ClipLoss(), OpenClipLoss()), (SigLipLoss(), OpenSigLipLoss())], ids=["clip", "siglip"]
)
def test_equals_the_original_in_one_process(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, original = leaves(), leaves()
    loss, expected = ours(*mine), theirs(*original)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, leaf in zip(mine, original, strict=True):
        torch.testing.assert_close(gradient(found), gradient(leaf), rtol=1e-10, atol=1e-13)
    assert ours(*leaves(), output_dict=True).keys() == {"contrastive_loss"}


def _both(workers: Workers) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients with the drop-in and with open_clip's default, on this worker's half of the batch."""
    import torch.distributed as dist

    results = []
    for loss in (ClipLoss(rank=workers.rank, world_size=4), OpenClipLoss(rank=workers.rank, world_size=4)):
        mine = leaves(slice(3 * workers.rank, 3 * workers.rank + 3))
        loss(*mine[:3]).backward()
        scale = gradient(mine[2])
        dist.all_reduce(scale)
        results.append([gradient(mine[0]), scale])
    return results[0], results[1]


def test_gradients_are_exact_where_the_originals_default_is_not(pool: Pool) -> None:
    """open_clip's default gathers without gradient: after DDP's average, encoders get 1/W of the gradient."""
    whole = leaves()
    OpenClipLoss()(*whole[:3]).backward()
    answers = pool.run(_both, 4)
    ours = torch.cat([answer[0][0] for answer in answers]) / 4
    theirs = torch.cat([answer[1][0] for answer in answers]) / 4
    torch.testing.assert_close(ours, gradient(whole[0]), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(theirs, gradient(whole[0]) / 4, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(answers[0][0][1] / 4, gradient(whole[2]), rtol=1e-10, atol=1e-13)


def test_wrong_world_size_is_said() -> None:
    with pytest.raises(ConfigError, match="world_size=2"):
        ClipLoss(world_size=2)(*leaves()[:3])
