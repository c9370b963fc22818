"""Proxies: learnt vectors stand for classes, so that anchors compare with them and not with each other.

ProxyNCA (`proxy-nca`), with s_ip = <z_i, p> for proxies of length 1 and |z_i - p|^2 = const - 2 s_ip:

    loss_i = -log( sum_{p of y_i} exp(2 s_ip / tau) / sum_{p not of y_i} exp(2 s_ip / tau) )

Movshovitz-Attias et al. 2017, "No Fuss Distance Metric Learning using Proxies"; `denominator: all` sums
over all proxies: Teh et al. 2020, "ProxyNCA++", and with one proxy a class the normalised softmax of Zhai and Wu
2019, "Classification is a Strong Baseline for Deep Metric Learning", at half the temperature.

Proxy anchor (`proxy-anchor`), where the proxies are the anchors:

    loss = 1/|P+| sum_{p in P+} log( 1 + sum_{i of p} exp(-alpha (s_ip - delta)) )
         + 1/|P|  sum_{p}       log( 1 + sum_{i not of p} exp( alpha (s_ip + delta)) )

Kim et al. 2020, "Proxy Anchor Loss for Deep Metric Learning": P+ are the proxies whose class is in the global
batch.

Embeddings of all views count. `per_class` proxies of a class share its samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, Tiler, column_lse, row_lse, row_sum
from cl.engine.side import Side
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.supervised.labelled import PROTOTYPES, LabelledConfig, LabelledObjective, each_anchor
from cl.objectives.supervised.prototypes import ClassPrototypes
from cl.objectives.temperature import TemperatureConfig
from cl.objectives.tiled import ScaledObjective
from cl.pairs import Pairs


class ProxyConfig(LabelledConfig):
    extra: list[str] = Field([], max_length=0, description="none: embeddings are compared with proxies alone")
    classes: int = Field(ge=1, description="number of classes of the data, not of the batch")
    per_class: int = Field(1, ge=1, description="proxies of each class")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


class ProxyObjective(LabelledObjective):
    """Anchors against proxies alone."""

    state = ("prototypes",)

    def __init__(self, config: ProxyConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None  # filled in by `build`
        self.proxies = ClassPrototypes(config.classes, config.dimensions, config.per_class)

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [(view, PROTOTYPES) for view in views if view != PROTOTYPES]

    def constants(self, pairs: Pairs) -> list[Side]:
        return [self.proxies.side(pairs, self.label)]

    def learnt(self) -> Sequence[Tensor]:
        """Without the proxies, whose gradient is that of their side."""
        return [p for p in self.parameters() if p is not self.proxies.vectors]


class ProxyNCAConfig(ProxyConfig, TemperatureConfig):
    temperature: Scheduled = Field(0.11, description="initial temperature; squared distances are divided by it")
    denominator: Literal["others", "all"] = Field("others", description="whether own proxies are in the denominator")


@OBJECTIVES.register(
    "proxy-nca",
    "softmax over learnt proxies of the classes by distance (metric learning)",
    paper="No Fuss Distance Metric Learning using Proxies",
)
class ProxyNCA(ProxyObjective, ScaledObjective):
    """See the module's formula. Parameters: proxies [classes * per_class, D], log of the inverse temperature."""

    Config = ProxyNCAConfig

    def __init__(self, config: ProxyNCAConfig) -> None:
        super().__init__(config)
        self.denominator = config.denominator

    def tile(self, t: Tile) -> Reductions:
        logits, own = 2 * self.temperature() * t.scores, self.positives(t)
        rest = row_lse(logits, mask=None if self.denominator == "all" else ~own)
        return {"own": row_lse(logits, mask=own), "rest": rest}

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            own, rest = s["own", view], s["rest", view]
            return rest - own, own.isfinite() & rest.isfinite()

        return each_anchor(s, loss)


class ProxyAnchorConfig(ProxyConfig):
    alpha: float = Field(32.0, gt=0, description="the scale")
    delta: float = Field(0.1, description="the margin")


@OBJECTIVES.register(
    "proxy-anchor",
    "learnt proxies of the classes as anchors, all samples of the batch as their candidates (metric learning)",
    paper="Proxy Anchor Loss for Deep Metric Learning",
)
class ProxyAnchor(ProxyObjective):
    """See the module's formula. Parameters: proxies [classes * per_class, D]."""

    Config = ProxyAnchorConfig

    def __init__(self, config: ProxyAnchorConfig) -> None:
        super().__init__(config)
        self.alpha, self.delta = config.alpha, config.delta

    def passes(self) -> Sequence[Tiler]:
        return [self.gather, self.tile]

    def gather(self, t: Tile) -> Reductions:
        """What each proxy sees of all samples."""
        own = self.positives(t)
        return {
            "pull": column_lse(-self.alpha * (t.scores - self.delta), mask=own),
            "push": column_lse(self.alpha * (t.scores + self.delta), mask=~own),
        }

    def tile(self, t: Tile) -> Reductions:
        """The sums over proxies: the same number for every row, so that their mean over samples is that number."""
        pull, push = t.column("pull"), t.column("push")
        zero = torch.zeros_like(pull)
        return {
            "pull sum": row_sum(torch.logaddexp(zero, pull).expand(t.scores.shape), over="all"),
            "push sum": row_sum(torch.logaddexp(zero, push).expand(t.scores.shape), over="all"),
            "present": row_sum(pull.isfinite().to(t.scores).expand(t.scores.shape), over="all"),
            "number": row_sum(torch.ones_like(t.scores), over="all"),
        }

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            pull = s["pull sum", view] / s["present", view].clamp_min(1)
            return pull + s["push sum", view] / s["number", view].clamp_min(1), s["number", view] > 0

        return each_anchor(s, loss)
