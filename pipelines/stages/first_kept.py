"""Which rows stay when some are alike: in a fixed order, a row is dropped if it is like a row that is kept.

That is the lexicographically first maximal independent set of the graph of alike pairs: no two kept rows are alike, and
nothing hangs on a dropped row, so no chain of likenesses joins what is not alike itself. It is found in rounds
(Blelloch, Fineman and Shun 2012, "Greedy Sequential Maximal Independent Set and Matching are Parallel on Average"): a
row is dropped as soon as an earlier neighbour is kept, and kept once all of them are dropped. A partition decides as
many of its rows as it can and tells other partitions of those that have neighbours there; a random order takes
O(log^2 n) rounds. The result is that of one loop over the order, whatever the partitions.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipelines.keyed import mix
from pipelines.shuffle import Routed
from pipelines.stages.keyed import Inbox, Round, Streams, fragment_of, place_of

UNKNOWN, KEPT, DROPPED = 0, 1, 2
# A pair as its later row (v) sees it; rank and id of the earlier row (u) say which of several kept ones comes first.
IN_EDGES = pa.schema(
    [("v", pa.int64()), ("u", pa.int64()), ("value", pa.float32()), ("rank", pa.float64()),
     ("id0", pa.uint64()), ("id1", pa.uint64()), ("state", pa.int8())]
)  # fmt: skip
OUT_EDGES = pa.schema([("u", pa.int64()), ("v", pa.int64())])  # the same pair as its earlier row sees it
COPIES = pa.schema([("v", pa.int64()), ("id0", pa.uint64()), ("id1", pa.uint64()), ("copy", pa.int64())])
NEWS = pa.schema([("u", pa.int64()), ("state", pa.int8())])
VERDICTS = pa.schema([("row", pa.int32()), ("id0", pa.uint64()), ("id1", pa.uint64()), ("value", pa.float32())])
STATE = ("in_edges", "out_edges", "copies", "news")


def home(references: np.ndarray, partitions: int) -> np.ndarray:
    """int64: the partition that decides on each row."""
    return (mix(references.astype(np.uint64)) % np.uint64(partitions)).astype(np.int64)


def edges(
    u: np.ndarray, v: np.ndarray, value: np.ndarray, rank: np.ndarray, ids: np.ndarray, partitions: int
) -> Streams:
    """Alike pairs on their way to the partitions that decide on them.

    Args:
        u, v: int64 [pairs], the earlier and the later row.
        value: float32 [pairs], how alike they are.
        rank: float64 [pairs] and ids: uint64 [pairs, 2], of u.
    """
    columns = [v, u, value.astype(np.float32), rank, ids[:, 0], ids[:, 1], np.zeros(len(u), np.int8)]
    return {
        "in_edges": Routed(pa.table(columns, schema=IN_EDGES), home(v, partitions)),
        "out_edges": Routed(pa.table([u, v], schema=OUT_EDGES), home(u, partitions)),
    }


def deciding(same: float) -> Round:
    """The round that ends with `verdicts`: of each dropped row, the first kept one it is like and how alike they are.

    Reads `in_edges`, `out_edges`, and `copies`: rows that share the fate of another (v) and are as alike as `same`.
    """
    return Round(
        "decide",
        over="partitions",
        reads=STATE,
        writes=(*STATE, "verdicts"),
        run=lambda inbox: _decide(inbox, same),
        repeats=STATE,
    )


def _decide(inbox: Inbox, same: float) -> Streams:
    v, u, value, rank, id0, id1, edge = _arrays(inbox.streams["in_edges"])
    out_u, out_v = _arrays(inbox.streams["out_edges"])
    copy_v, copy_id0, copy_id1, copy = _arrays(inbox.streams["copies"])
    vertices = np.unique(np.concatenate([v, out_u, copy_v]))
    edge = edge.copy()
    if "news" in inbox.streams:
        told, states = _arrays(inbox.streams["news"])
        _hear(told, states, u, edge)
    mine = np.searchsorted(vertices, v)
    state = _settle(vertices, mine, u, edge)

    waits = np.bincount(mine[edge == UNKNOWN], minlength=len(vertices)) > 0
    final = (state != UNKNOWN) & ~waits
    # Of each final dropped row, the first of its kept neighbours.
    told = np.flatnonzero((edge == KEPT) & final[mine])
    told = told[np.lexsort((id1[told], id0[told], rank[told], mine[told]))]
    first = told[np.diff(mine[told], prepend=-1) != 0]
    keeper = np.full(len(vertices), -1, np.int64)
    keeper[mine[first]] = first

    of = np.searchsorted(vertices, copy_v)
    ready = final[of]
    by = keeper[of[ready]]
    own = by < 0  # the row itself is kept
    rows = np.concatenate([v[first], copy[ready]])
    verdict = [
        place_of(rows),
        np.concatenate([id0[first], np.where(own, copy_id0[ready], _at(id0, by))]),
        np.concatenate([id1[first], np.where(own, copy_id1[ready], _at(id1, by))]),
        np.concatenate([value[first], np.where(own, np.float32(same), _at(value, by))]),
    ]
    decided = state[np.searchsorted(vertices, out_u)]
    away = (decided != UNKNOWN) & (home(out_v, inbox.partitions) != inbox.task)
    open_edges, open_copies, undecided = ~final[mine], ~ready, decided == UNKNOWN
    updated = inbox.streams["in_edges"].set_column(6, IN_EDGES.field("state"), pa.array(edge, pa.int8()))
    left = updated.filter(pa.array(open_edges))
    news = pa.table([out_u[away], decided[away]], schema=NEWS)
    return {
        "in_edges": Routed(left, np.full(left.num_rows, inbox.task)),
        "out_edges": _stay(inbox, "out_edges", undecided),
        "copies": _stay(inbox, "copies", open_copies),
        "news": Routed(news, home(out_v[away], inbox.partitions)),
        "verdicts": Routed(pa.table(verdict, schema=VERDICTS), fragment_of(rows)),
    }


def _settle(vertices: np.ndarray, mine: np.ndarray, u: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """Decide what can be decided here: the state of each vertex; states of the edges' u are filled in.

    Args:
        vertices: int64 [n], ascending.
        mine: index of each edge's v among them.
        u: int64 [edges].
        edge: int8 [edges], what is known of each u.
    """
    state = np.zeros(len(vertices), np.int8)
    place = np.searchsorted(vertices, u)
    local = np.zeros(len(u), bool)
    inside = place < len(vertices)
    local[inside] = vertices[place[inside]] == u[inside]
    waiting = np.arange(len(u))  # edges whose v is undecided
    undecided = np.ones(len(vertices), bool)
    while True:
        fresh = waiting[local[waiting] & (edge[waiting] == UNKNOWN)]
        edge[fresh] = state[place[fresh]]
        near = np.zeros(len(vertices), bool)
        near[mine[waiting[edge[waiting] == KEPT]]] = True
        open_ = np.zeros(len(vertices), bool)
        open_[mine[waiting[edge[waiting] == UNKNOWN]]] = True
        dropped, kept = undecided & near, undecided & ~near & ~open_
        if not (dropped.any() or kept.any()):
            break
        state[dropped], state[kept] = DROPPED, KEPT
        undecided &= ~(dropped | kept)
        waiting = waiting[undecided[mine[waiting]]]
    late = np.flatnonzero(local & (edge == UNKNOWN))
    edge[late] = state[place[late]]
    return state


def _hear(told: np.ndarray, states: np.ndarray, u: np.ndarray, edge: np.ndarray) -> None:
    """Fill in what other partitions say of the edges' u."""
    if not len(told):
        return
    told, first = np.unique(told, return_index=True)
    place = np.minimum(np.searchsorted(told, u), len(told) - 1)
    hit = (told[place] == u) & (edge == UNKNOWN)
    edge[hit] = states[first][place[hit]]


def _arrays(table: pa.Table) -> list[np.ndarray]:
    return [column.to_numpy() for column in table.columns]


def _at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """values[index], with anything where the index is -1."""
    return values[index] if len(values) else np.zeros(len(index), values.dtype)


def _stay(inbox: Inbox, name: str, mask: np.ndarray) -> Routed:
    """Rows of a stream that this partition sends to itself."""
    left = inbox.streams[name].filter(pa.array(mask))
    return Routed(left, np.full(left.num_rows, inbox.task))
