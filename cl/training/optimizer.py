"""AdamW with decay where it belongs: on matrices, not on norms, biases, gains or the temperature."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from cl.training.config import OptimizerConfig


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters of a module as (decayed, not decayed), each once, in the order of their names.

    Everything of fewer than two dimensions is a bias, a norm's gain, a class token or a temperature: not decayed.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for _, parameter in sorted(module.named_parameters(), key=lambda item: item[0]):
        if parameter.requires_grad:
            (decayed if parameter.dim() >= 2 else spared).append(parameter)
    return decayed, spared


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> AdamW:
    """AdamW over a module's trainable parameters; one fused kernel on CPU and GPU."""
    decayed, spared = decay_groups(module)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
