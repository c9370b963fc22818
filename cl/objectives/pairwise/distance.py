"""Distances on tiles: |a - c|^2 = |a|^2 + |c|^2 - 2 <a, c>, from the tile's inner products and per-sample norms.

A rule that uses them returns `square_norms` from its `inputs`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from cl.engine.rule import Samples, Tile


def square_norms(s: Samples, views: Iterable[str]) -> dict[tuple[str, str], Tensor]:
    """The inputs |x|^2 of each sample, [B] by view."""
    return {("square_norm", view): _wide(s.views[view]).square().sum(1) for view in views}


def squared_distances(t: Tile) -> Tensor:
    """[R, C]: |a_i - c_j|^2."""
    return (t.row("square_norm") + t.column("square_norm") - 2 * t.scores).clamp_min(0)


def own_squared_distance(s: Samples, first: str, second: str) -> Tensor:
    """[B]: |a_i - b_i|^2 of each sample's embeddings in two views."""
    return (_wide(s.views[first]) - _wide(s.views[second])).square().sum(1)


def root(value: Tensor, least: float = 1e-12) -> Tensor:
    """The square root, with slope 0 instead of infinity where `value` is (nearly) 0."""
    some = value > least
    return value.where(some, 1).sqrt().where(some, 0)


def power(squared: Tensor, exponent: float) -> Tensor:
    """d^(2 exponent) from d^2, with slope 0 instead of infinity at d = 0."""
    if exponent == 1:
        return squared
    some = squared > 1e-12
    return squared.where(some, 1).pow(exponent).where(some, 0)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.element_size() < 4 else value
