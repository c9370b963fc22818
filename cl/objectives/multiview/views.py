"""What objectives for any number of views share."""

from __future__ import annotations

from pydantic import Field

from cl.engine.collectives import Layout
from cl.errors import DataError
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class ManyViewsConfig(ScaledConfig):
    extra: list[str] = Field([], max_length=0, description="none: every view is compared with every other")


class ManyViewsObjective(ScaledObjective):
    """All views of the batch, or those that the config names, at least two."""

    compares = "any number of views"

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        pairs = super().derive(pairs, layout)
        if len(pairs.views) < 2:
            raise DataError(
                f"{type(self).__name__} compares the views of a sample, but there is only {list(pairs.views)}."
            )
        return pairs
