"""Optimizers, and which parameters get which rate and decay.

AdamW is PyTorch's, in one fused kernel; LAMB, LARS, Lion and Muon are timm's. Rates and decays go by the parameters'
names:

    rate of a parameter  = rate of the step * layer_decay^(top - depth) * lr_scale of the first group that matches
    decay of a parameter = weight_decay of that group, else the optimizer's; none for fewer than two dimensions

Depth counts a tower's blocks from its embeddings (0) to what follows the last block (the top), as BEiT (Bao et al.
2022) and EVA-CLIP count it; parameters outside of towers are at the top.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from cl.config import Config
from cl.errors import ConfigError

# name -> fields of OptimizerConfig that it reads beside lr, weight_decay, layer_decay and groups
READS = {
    "adamw": {"betas", "eps"},
    "lamb": {"betas", "eps"},
    "lion": {"betas"},
    "muon": {"betas", "momentum"},
    "lars": {"momentum"},
    "sgd": {"momentum"},
}
_TOWER = re.compile(r"(?:^|\.)towers\.(\w+)\.")
_BLOCK = re.compile(r"\.(?:resblocks|blocks|layers?|stages|h)\.(\d+)(?=\.)")
_EMBEDDING = re.compile(r"embed|conv1|stem|ln_pre|norm_pre|cls_token|reg_token")


class ParameterGroupConfig(Config):
    """Parameters with a rate or decay of their own."""

    parameters: str = Field(description="pattern of names, e.g. *.log_scale, towers.image.*, objective.*")
    lr_scale: float = Field(1.0, ge=0, description="times the rate of the step")
    weight_decay: float | None = Field(None, ge=0, description="null: as elsewhere")


class OptimizerConfig(Config):
    """What moves the weights.

    adamw: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization". lamb: You et al. 2020, "Large Batch
    Optimization for Deep Learning: Training BERT in 76 minutes". lars: You et al. 2017, "Large Batch Training of
    Convolutional Networks". lion: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms". muon: Jordan et
    al. 2024, for matrices, with NAdamW for embeddings and all that is no matrix. sgd: with Nesterov's momentum.
    """

    name: Literal["adamw", "lamb", "lars", "lion", "muon", "sgd"] = Field("adamw", description="the rule")
    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), description="decay of the running mean and square of gradients")
    eps: float = Field(1e-6, gt=0, description="added to the root of the running square")
    momentum: float = Field(0.9, ge=0, lt=1, description="of lars, muon and sgd")
    weight_decay: float = Field(0.2, ge=0, description="of matrices; norms, biases and temperature have none")
    layer_decay: float = Field(1.0, gt=0, le=1, description="rate of each block of a tower / that of the block above")
    groups: list[ParameterGroupConfig] = Field([], description="rates and decays by name; the first match counts")

    @model_validator(mode="after")
    def _fields_fit(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {list(self.betas)}")
        for field in ("betas", "eps", "momentum"):
            unused = field not in READS[self.name]  # its default is there all the same in a resolved config
            if unused and getattr(self, field) != type(self).model_fields[field].default:
                had = ", ".join(sorted(READS[self.name]))
                raise ValueError(f"{field} is not a setting of {self.name}, which has {had}")
        return self


def parameter_groups(config: OptimizerConfig, module: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of a module by rate and decay, each once, in an order that depends on names alone.

    Each group holds `params`, `weight_decay` and `lr_scale`, and for muon `use_fallback`.

    Raises:
        ConfigError: a pattern of `config.groups` matches no trainable parameter.
    """
    named = sorted(_trainable(module), key=lambda item: item[0])
    depths = layers_above([name for name, _ in named]) if config.layer_decay < 1 else {}
    unused = {group.parameters for group in config.groups}
    found: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        group = next((each for each in config.groups if fnmatchcase(name, each.parameters)), None)
        scale = config.layer_decay ** depths.get(name, 0)
        # Fewer than two dimensions: a bias, a norm's gain, a class token or a temperature.
        decay = config.weight_decay if parameter.dim() >= 2 else 0.0
        if group is not None:
            unused.discard(group.parameters)
            scale *= group.lr_scale
            decay = decay if group.weight_decay is None else group.weight_decay
        fallback = config.name == "muon" and (parameter.dim() < 2 or bool(_EMBEDDING.search(name)))
        found.setdefault((fallback, decay, scale), []).append(parameter)
    if unused:
        raise ConfigError(f"optimizer.groups: no trainable parameter has a name like {sorted(unused)[0]!r}.")
    groups = []
    for (fallback, decay, scale), parameters in sorted(
        found.items(), key=lambda item: (item[0][0], *(-x for x in item[0][1:]))
    ):
        groups.append({"params": parameters, "weight_decay": decay, "lr_scale": scale})
        if config.name == "muon":
            groups[-1]["use_fallback"] = fallback
    return groups


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def layers_above(names: list[str]) -> dict[str, int]:
    """Name -> how many layers lie above a parameter in its tower."""
    towers: dict[str, list[str]] = {}
    for name in names:
        if (tower := _TOWER.search(name)) is not None:
            towers.setdefault(tower[1], []).append(name)
    above: dict[str, int] = {}
    for members in towers.values():
        block_of = {name: tuple(int(n) for n in _BLOCK.findall(name)) for name in members}
        order = sorted({block for block in block_of.values() if block})
        for name, block in block_of.items():
            if block:
                above[name] = len(order) - order.index(block)
            elif _EMBEDDING.search(name):
                above[name] = len(order) + 1
    return above


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> Optimizer:
    """An optimizer of a module's trainable parameters.

    Raises:
        ConfigError: a pattern of `config.groups` matches no trainable parameter.
    """
    groups = parameter_groups(config, module)
    if config.name == "adamw":
        return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    from timm import optim

    if config.name == "lamb":  # gradients are clipped by the run
        return optim.Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps, max_grad_norm=None)
    if config.name == "lars":
        return optim.Lars(groups, lr=config.lr, momentum=config.momentum)
    if config.name == "lion":
        return optim.Lion(groups, lr=config.lr, betas=config.betas)
    return optim.Muon(groups, lr=config.lr, betas=config.betas, momentum=config.momentum, nesterov=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group its share of this step's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
