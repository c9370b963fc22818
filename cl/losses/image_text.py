"""The losses of open_clip, by their signatures.

Arguments that only choose among the original's ways of gathering (`local_loss`, `gather_with_grad`, `dist_impl`,
`cache_labels`) are accepted and make no difference: there is one, exact way. The loss expects what open_clip's loops
do: gradients averaged over `world_size` workers (DDP), in the default process group.

One argument is not the original's. With accumulation, open_clip's loop calls the loss `accum_freq` times for one batch,
each time with the embeddings of another part attached: embeddings get their gradient once, the scale and the bias
`accum_freq` times. `accum_freq=args.accum_freq` divides theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.engine.collectives import Workers
from cl.engine.sigmoid import sigmoid_loss
from cl.engine.sweep import Tiling
from cl.engine.symmetric import symmetric_infonce
from cl.errors import ConfigError


def _workers(world_size: int) -> Workers:
    workers = Workers.current()
    if workers.size != world_size:
        raise ConfigError(
            f"The loss was made for world_size={world_size}, but torch.distributed has {workers.size} worker(s)."
        )
    return workers


def _scalar(learnt: Tensor, parts: int) -> Tensor:
    """The same value, 0-d (open_clip also keeps its scale as [1]), with 1/parts of the gradient."""
    learnt = learnt.reshape(())
    return learnt if parts == 1 else learnt.detach() + (learnt - learnt.detach()) / parts


def _weight(features: Tensor) -> Tensor:
    kind = torch.float64 if features.dtype == torch.float64 else torch.float32
    return torch.ones(len(features), dtype=kind, device=features.device)


class ClipLoss(nn.Module):
    """The symmetric softmax loss with the signature of `open_clip.loss.ClipLoss`.

    Args:
        accum_freq: not the original's; for how many calls one batch is shown, see above.

    Raises:
        ConfigError: `use_horovod`, or a `world_size` that is not that of the process group.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        accum_freq: int = 1,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ConfigError("cl.losses.ClipLoss works on torch.distributed, not on Horovod.")
        self.rank, self.world_size, self.accum_freq = rank, world_size, accum_freq
        self.tiling = Tiling()

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of the global batch.

        Args:
            image_features, text_features: normalised embeddings [B, D] of this worker.
            logit_scale: 0-d, the inverse temperature (not its log).
            logit_bias: 0-d or None; a softmax does not change with it, so its gradient is 0.
            output_dict: return {"contrastive_loss": loss}.
        """
        loss, _, _ = symmetric_infonce(
            image_features,
            text_features,
            _scalar(logit_scale, self.accum_freq),
            layout=_workers(self.world_size).layout(len(image_features), image_features.device),
            weight=_weight(image_features),
            tiling=self.tiling,
        )
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """The sigmoid loss with the signature of `open_clip.loss.SigLipLoss`.

    Args:
        accum_freq: not the original's; for how many calls one batch is shown, see above.

    Raises:
        ConfigError: a `world_size` that is not that of the process group.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        accum_freq: int = 1,
    ) -> None:
        super().__init__()
        self.rank, self.world_size, self.accum_freq = rank, world_size, accum_freq
        self.tiling = Tiling()

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of the global batch; arguments as in `ClipLoss`, with a bias that counts."""
        loss = sigmoid_loss(
            image_features,
            text_features,
            _scalar(logit_scale, self.accum_freq),
            _scalar(logit_bias, self.accum_freq),
            layout=_workers(self.world_size).layout(len(image_features), image_features.device),
            weight=_weight(image_features),
            tiling=self.tiling,
        )
        return {"contrastive_loss": loss} if output_dict else loss
