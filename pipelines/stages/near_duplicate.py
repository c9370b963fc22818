"""Images that look alike: a row goes only if it is itself within the thresholds of a row that stays.

Candidates are pairs of perceptual hashes within a Hamming distance d, found exactly: with the 64 bits cut into d + k
bands, two hashes that differ in at most d bits agree in at least k whole bands (pigeonhole; Norouzi et al. 2012, "Fast
Search in Hamming Space with Multi-Index Hashing"), so rows are grouped by every choice of k bands. k grows with the
corpus, so that groups stay small. A candidate counts if the true Hamming distance is at most d and the thumbnails
differ nowhere by more than `max_difference` levels: an average would call any two small marks on white alike.

Rows are then taken in order (best first, ties by id): a row that is near a kept row is dropped and points to it, any
other is kept. No chain of likenesses joins what is not alike: nothing hangs on a dropped row.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.keyed import id_text, id_words
from pipelines.stages.base import Context, GlobalStage, Output, Rows, Stage, internal
from pipelines.stages.exact_duplicate import duplicates
from pipelines.stages.perceptual_hash import PerceptualHash
from pipelines.stages.registry import STAGES

PARTIAL = pa.schema([("phash", pa.uint64()), ("id0", pa.uint64()), ("id1", pa.uint64()), ("score", pa.float64())])
REDUCED = pa.schema([("row", pa.int32()), ("kept", pa.string()), ("distance", pa.int32())])


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs i < j of distinct hashes, uint64 [n], that differ in at most `distance` bits: int64 [pairs, 2]."""
    if distance < 1 or len(hashes) < 2:
        return np.zeros((0, 2), np.int64)
    agree = _bands_to_agree(len(hashes), distance)
    bands = np.array_split(np.arange(64), distance + agree)
    masks = [np.uint64(sum(1 << int(bit) for bit in band)) for band in bands]
    found = [np.zeros(0, np.int64)]
    count = len(hashes)
    for chosen in itertools.combinations(masks, agree):
        keys = hashes & np.bitwise_or.reduce(np.array(chosen, np.uint64))
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        # Compare each row with the next, the next but one ... as long as any group is that long.
        same = np.arange(count - 1)
        for step in range(1, count):
            same = same[same + step < count]
            same = same[ordered[same] == ordered[same + step]]
            if not len(same):
                break
            first, second = order[same], order[same + step]
            near = np.bitwise_count(hashes[first] ^ hashes[second]) <= distance
            low, high = np.minimum(first, second)[near], np.maximum(first, second)[near]
            found.append(low * count + high)
    pairs = np.unique(np.concatenate(found))
    return np.stack([pairs // count, pairs % count], 1)


def _bands_to_agree(count: int, distance: int) -> int:
    """The least number k of bands whose value is shared by about one of `count` hashes at most; 1 to 4."""
    for agree in range(1, 4):
        if count / 2 ** (64 * agree / (distance + agree)) <= 8:
            return agree
    return 4


@STAGES.register(
    "near_duplicate",
    "Drop images that look like one that is kept: perceptual hash, verified on the hash and on a thumbnail",
    "Fast Search in Hamming Space with Multi-Index Hashing",
)
class NearDuplicate(GlobalStage):
    """The reduction holds about 100 bytes a living row, and thumbnails of those with a candidate."""

    kinds: ClassVar[tuple[Kind, ...]] = ("image-text",)
    drops: ClassVar[bool] = True

    max_distance: int = Field(4, ge=0, le=10, description="bits of 64 in which two hashes may differ")
    max_difference: int = Field(
        16, ge=0, le=255, description="levels of 255 by which any pixel of two 8 x 8 thumbnails may differ"
    )
    best: str | None = Field(None, description="numeric column whose highest value is kept; None: the smaller id")

    def before(self, kind: Kind) -> list[Stage]:
        return [PerceptualHash()]

    def needs(self, kind: Kind) -> list[str]:
        return ["phash", "thumbnail"] + ([self.best] if self.best else [])

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [internal("near_duplicate_of", pa.string()), internal("near_duplicate_distance", pa.int32())]

    def partial(self, rows: Rows) -> pa.Table:
        ids = id_words(rows.table["id"].to_pylist())
        score = np.nan_to_num(rows.numbers(self.best), nan=-np.inf) if self.best else np.zeros(len(rows))
        columns = [rows.table["phash"].to_numpy(), ids[:, 0], ids[:, 1], score]
        return pa.table([pa.array(values) for values in columns], schema=PARTIAL)

    def reduce(self, partials: list[pa.Table], context: Context) -> list[pa.Table]:
        table = pa.concat_tables(partials)
        phash, id0, id1, score = (table[name].to_numpy() for name in PARTIAL.names)
        starts = np.cumsum([0, *(partial.num_rows for partial in partials)])
        hashes, group = np.unique(phash, return_inverse=True)
        neighbours: dict[int, list[int]] = defaultdict(list)
        for first, second in near_pairs(hashes, self.max_distance).tolist():
            neighbours[first].append(second)
            neighbours[second].append(first)
        sizes = np.bincount(group, minlength=len(hashes))
        close = sizes > 1
        close[list(neighbours)] = True
        candidates = np.flatnonzero(close[group])
        thumbnails = _thumbnails(context, candidates, starts)
        order = candidates[np.lexsort((id1[candidates], id0[candidates], -score[candidates]))]
        where = np.full(len(phash), -1, np.int64)
        where[candidates] = np.arange(len(candidates))
        kept: dict[int, list[int]] = defaultdict(list)  # hash -> kept rows with it, in order
        rank: dict[int, int] = {}
        verdict: list[tuple[int, int]] = []  # dropped row, the row it is near
        for row in order.tolist():
            mine = int(group[row])
            others = [other for each in (mine, *neighbours.get(mine, ())) for other in kept.get(each, ())]
            near = self._near(row, others, thumbnails, where)
            if near:
                verdict.append((row, min(near, key=rank.__getitem__)))
            else:
                rank[row] = len(rank)
                kept[mine].append(row)
        return self._split(sorted(verdict), starts, np.stack([id0, id1], 1), phash)

    def _near(self, row: int, others: list[int], thumbnails: np.ndarray, where: np.ndarray) -> list[int]:
        """Those of `others` (all within the Hamming distance) whose thumbnails are near as well."""
        if not others:
            return []
        difference = np.abs(thumbnails[where[others]].astype(np.int16) - thumbnails[where[row]]).max(1)
        return [other for other, value in zip(others, difference, strict=True) if value <= self.max_difference]

    def _split(
        self, verdict: list[tuple[int, int]], starts: np.ndarray, ids: np.ndarray, phash: np.ndarray
    ) -> list[pa.Table]:
        dropped = np.array([row for row, _ in verdict], np.int64)
        keeper = np.array([row for _, row in verdict], np.int64)
        distance = np.bitwise_count(phash[dropped] ^ phash[keeper]).astype(np.int32)
        out = []
        for start, end in itertools.pairwise(starts.tolist()):
            part = slice(*np.searchsorted(dropped, [start, end]))
            columns = [dropped[part] - start, id_text(ids[keeper[part]]), distance[part]]
            out.append(pa.table([pa.array(columns[0], pa.int32()), columns[1], columns[2]], schema=REDUCED))
        return out

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        output = duplicates(len(rows), reduced, "near_duplicate_of", "near_duplicate")
        distance = np.full(len(rows), None, dtype=object)
        distance[reduced["row"].to_numpy()] = reduced["distance"].to_pylist()
        output.columns["near_duplicate_distance"] = distance
        return output


def _thumbnails(context: Context, candidates: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Thumbnails of the candidates, uint8 [n, bytes], read fragment by fragment."""
    parts = []
    for fragment in range(context.fragments):
        low, high = np.searchsorted(candidates, [starts[fragment], starts[fragment + 1]])
        if low < high:
            column = context.columns.read(fragment, "thumbnail").take(pa.array(candidates[low:high] - starts[fragment]))
            parts += [np.frombuffer(value, np.uint8) for value in column.to_pylist()]
    return np.stack(parts) if parts else np.zeros((0, 1), np.uint8)
