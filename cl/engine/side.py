"""What tiles are made of: sides (one set of embeddings each) and what is known of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cl.engine.collectives import Layout, Replicated, Workers
from cl.engine.sweep import repeated_content


@dataclass(frozen=True)
class Side:
    """One set of embeddings that tiles are made of, this worker's part of it, and what is known of its rows.

    Attributes:
        name: the view's name.
        embeddings: [n, D], or of tokens [n, T, D].
        sample: [n] int64, the global number of the sample that a row belongs to; -1 for none (queues, prototypes).
        weight: [n], 0 masks.
        content: [n, K] int64 or None.
        meta: name -> [n, ...], anything else a rule reads.
        role: `view`: a column of the row's own sample is its positive; `negative`: it is a negative of everybody, of
            its own sample too.
        replicated: every worker holds the same rows (queue, prototypes); they are not gathered.
        layout: how many rows each worker holds, where that is known already.
    """

    name: str
    embeddings: Tensor
    sample: Tensor
    weight: Tensor
    content: Tensor | None = None
    meta: Mapping[str, Tensor] = field(default_factory=dict)
    role: Literal["view", "negative"] = "view"
    replicated: bool = False
    layout: Layout | None = None


@dataclass(frozen=True)
class Known:
    """What is known of a slice of rows or columns: as in `Side`, and the statistics of earlier passes.

    `masked` says whether any weight of the whole side is 0, so that most tiles skip the mask. `span` are the samples of
    rows that are consecutive (none of rows without samples), or None where they may be any: two spans tell without
    looking at the numbers that a tile holds nobody's own pair.
    """

    sample: Tensor
    weight: Tensor
    content: Tensor | None
    repeated: Tensor | None
    meta: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    role: str
    masked: bool
    span: range | None

    def slice(self, at: slice, statistics: Mapping[str, Tensor]) -> Known:
        return Known(
            self.sample[at],
            self.weight[at],
            None if self.content is None else self.content[at],
            None if self.repeated is None else self.repeated[at],
            {name: value[at] for name, value in self.meta.items()},
            statistics,
            self.role,
            self.masked,
            None if self.span is None else self.span[at],
        )

    def apart(self, other: Known) -> bool:
        """Whether no row of one is known to belong to the sample of a row of the other."""
        if self.span is None or other.span is None:
            return False
        return max(self.span.start, other.span.start) >= min(self.span.stop, other.span.stop)


@dataclass(frozen=True)
class Columns:
    """A side as all workers see it: its layout and what is known of every column (not the embeddings)."""

    side: Side
    layout: Layout
    known: Known

    @property
    def trained(self) -> bool:
        """Whether anybody wants the gradient of its embeddings; a frozen tower's costs no product."""
        return self.side.embeddings.requires_grad

    def local_weight(self) -> Tensor:
        """[n] of this worker's rows."""
        return self.known.weight[self.layout.local]


def columns_of(sides: Sequence[Side], workers: Workers) -> dict[str, Columns]:
    """Gather what is known of every side, by name; tensors that views of the same samples share are gathered once, and
    all that is known of the same rows by one collective.
    """
    layouts: dict[int, Layout] = {}
    wanted: dict[int, dict[int, Tensor]] = {}  # by layout: what its sides know of their rows
    for side in sides:
        key, rows = id(side.sample), len(side.sample)
        if key not in layouts:
            if side.replicated:
                layouts[key] = Replicated(workers, (rows,))
            elif side.layout is not None and side.layout.workers == workers:
                layouts[key] = side.layout
            else:
                layouts[key] = workers.layout(rows, side.sample.device)
        content = [] if side.content is None else [side.content]
        values = [side.sample, side.weight, *content, *side.meta.values()]
        wanted.setdefault(key, {}).update((id(value), value) for value in values)
    gathered = {
        key: dict(zip(values, layouts[key].gather_together(list(values.values())), strict=True))
        for key, values in wanted.items()
    }
    columns = {}
    for side in sides:
        everyone = gathered[id(side.sample)]
        sample, weight = everyone[id(side.sample)], everyone[id(side.weight)]
        consecutive = sample == torch.arange(len(sample), device=sample.device)
        masked, in_order, without = torch.stack(
            [(weight == 0).any(), consecutive.all(), (sample < 0).all()]  # one wait for the device
        ).tolist()
        known = Known(
            sample=sample,
            weight=weight,
            content=None if side.content is None else everyone[id(side.content)],
            repeated=None,
            meta={name: everyone[id(value)] for name, value in side.meta.items()},
            statistics={},
            role=side.role,
            masked=masked,
            span=range(0) if without else range(len(sample)) if in_order else None,
        )
        columns[side.name] = Columns(side, layouts[id(side.sample)], known)
    return _with_repetitions(columns)


def _with_repetitions(columns: Mapping[str, Columns]) -> dict[str, Columns]:
    """Mark the rows whose content occurs more than once on any side; where none does, tiles compare nothing."""
    contents = {id(c.known.content): c.known.content for c in columns.values() if c.known.content is not None}
    if not contents:
        return dict(columns)
    flags = repeated_content(torch.cat(list(contents.values()))).any(1)
    repeated = dict(zip(contents, flags.split([len(content) for content in contents.values()]), strict=True))
    if not flags.any():
        repeated = {}
    marked = {}
    for name, each in columns.items():
        found = repeated.get(id(each.known.content))
        known = replace(each.known, content=None if found is None else each.known.content, repeated=found)
        marked[name] = replace(each, known=known)
    return marked


def sides_of(views: Mapping[str, Tensor], layout: Layout, weight: Tensor, **known: Any) -> list[Side]:
    """The views of one batch as sides; row i of each belongs to sample i of this worker."""
    start = layout.local.start
    sample = torch.arange(start, start + len(weight), device=weight.device)
    return [Side(name, value, sample, weight, layout=layout, **known) for name, value in views.items()]
