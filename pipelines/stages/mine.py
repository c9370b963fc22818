"""Hard negatives: for each anchor, documents of other pairs that are near to it, and not right answers themselves.

The distinct documents (positives of all pairs) are ranked for each anchor by the cosine of their embeddings, without
those that are known to be right or that say nothing: its own positive, the positives of equal anchors, its own text. Of
the ranks of a band (SciNCL: Ostendorff et al. 2022, "Neighborhood Contrastive Learning for Scientific Document
Representations", samples from a band some way off, as the very nearest are often right) those go that score too high
beside the pair's own positive. With s and p the two scores, s <= p - margin stays, and s <= p - (1 - relative) |p|,
which for a positive p is relative p (NV-Retriever: Moreira et al. 2024; 0.95 is their best). A guide, another model,
may refuse a document that it holds nearer to the anchor than the positive (GISTEmbed: Solatorio 2024). Of what is left
the first `count` are taken, or a keyed choice.

What scores too high to be a negative is often right: `positives` collects the nearest of those (false negatives turned
into positives: Huynh et al. 2022, "Boosting Contrastive Self-Supervised Learning with False Negative Cancellation").

Further rounds after those of `pipelines.stages.neighbours`:

    known   P  by anchor: the positives of equal anchors, told to the fragments that hold one
    search  F  the nearest documents, those that may serve
    answer  F  their texts, by the fragments that hold them
    choose  F  the guide, the choice, and the lists
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import xxhash
from pydantic import Field, field_validator

from cl.corpus import Kind
from cl.errors import ConfigError
from pipelines.keyed import id_text, id_words, mix
from pipelines.nearest import Nearest, exact_scores
from pipelines.paths import absolute
from pipelines.shuffle import Routed
from pipelines.stages.base import Output, Rows, Stage, internal, reasons, vectors, whole
from pipelines.stages.embedding import Encoder, checkpoint_digest
from pipelines.stages.keyed import Inbox, Round, Streams, fragment_of, place_of
from pipelines.stages.neighbours import Neighbours, digests, holder, occurrences
from pipelines.stages.registry import STAGES

FOUND = [("row", pa.int32()), ("role", pa.int8()), ("rank", pa.int64()), ("score", pa.float64()),
         ("id0", pa.uint64()), ("id1", pa.uint64())]  # fmt: skip
ASKED = pa.schema([*FOUND, ("ref", pa.int64()), ("asker", pa.int64())])
CHOSEN = pa.schema([*FOUND, ("text", pa.string())])
PAIRED = pa.schema([("anchor", pa.uint64()), ("document", pa.uint64()), ("fragment", pa.int64())])
KNOWN = pa.schema([("anchor", pa.uint64()), ("document", pa.uint64())])
NEGATIVE, POSITIVE = 0, 1


@STAGES.register(
    "mine",
    "Hard negatives for each anchor among the positives of other pairs, with guards against false ones",
    "NV-Retriever: Improving text embedding models with effective hard-negative mining",
)
class Mine(Neighbours):
    """Writes the lists `mined_texts`, `mined_ids`, `mined_scores` and `mined_ranks`, the nearest first, and
    `mined_count`; with `positives`, `neighbour_texts` and `neighbour_ids`. `write: {replace: {negatives: mined_texts}}`
    puts them into the corpus. A task holds 32 bytes for each of its rows and ranks up to the last.
    """

    sends: ClassVar[tuple[str, ...]] = ("rows", "pairs")
    drops: ClassVar[bool] = True
    unkeyed: ClassVar[frozenset[str]] = frozenset({"guide"})  # the digest stands for the model

    count: int = Field(7, ge=1, description="negatives of a row, at most")
    ranks: tuple[int, int] = Field((1, 100), description="first and last rank that a negative may have, from 1")
    choose: Literal["nearest", "random"] = Field("nearest", description="which of those in the band: or a keyed choice")
    relative: float | None = Field(0.95, gt=0, le=1, description="highest score, as a share of the positive's")
    margin: float | None = Field(None, ge=0, description="by how much a negative must score below the positive")
    min_score: float | None = Field(None, ge=-1, le=1, description="lowest score of a negative")
    max_score: float | None = Field(None, ge=-1, le=1, description="highest score of a negative")
    guide: str | None = Field(None, description="another Clew checkpoint, which refuses what it holds for right")
    guide_margin: float = Field(0.0, description="by how much the guide must score a negative below the positive")
    positives: int = Field(0, ge=0, description="documents scoring at least like the positive to collect, at most")
    require: int = Field(0, ge=0, description="rows with fewer negatives are dropped")

    @field_validator("ranks")
    @classmethod
    def _a_band(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1]:
            raise ValueError("the first rank must be at least 1 and not above the last one")
        return value

    def resolve(self, model: str | None, kind: Kind) -> Stage:
        if self.require > self.count:
            raise ConfigError(f"Stage 'mine': require ({self.require}) must not be above count ({self.count}).")
        if self.guide and kind != "text-text":
            raise ConfigError("Stage 'mine': a guide reads texts alone, so it judges negatives of text pairs only.")
        return self.model_copy(update={"guide": self.guide and absolute(self.guide)})

    def digest(self) -> str:
        return checkpoint_digest(self.guide)[0] if self.guide else ""

    def makes(self, kind: Kind) -> list[pa.Field]:
        texts, numbers = pa.list_(pa.string()), pa.list_(pa.float32())
        made = [internal("mined_texts", texts), internal("mined_ids", texts), internal("mined_scores", numbers)]
        made += [internal("mined_ranks", pa.list_(pa.int64())), pa.field("mined_count", pa.int32())]
        return made + [internal(f"neighbour_{what}", texts) for what in ("texts", "ids") if self.positives]

    def partial(self, rows: Rows, partitions: int) -> Streams:
        query, document = self.sides(rows.corpus.kind)[0]
        anchors, which = (digests(rows.table[holder(rows.corpus.kind, view)]) for view in (query, document))
        table = pa.table([anchors, which, np.full(len(rows), rows.fragment)], schema=PAIRED)
        pairs = Routed(table, (anchors % np.uint64(partitions)).astype(np.int64))
        return super().partial(rows, partitions) | {"pairs": pairs}

    def rounds(self) -> list[Round]:
        return [
            *self.collecting(),
            Round("known", "partitions", ("pairs",), ("known",), self._known),
            Round("search", "fragments", ("known",), ("asked",), self._search),
            Round("answer", "fragments", ("asked",), ("answers",), self._answer),
            Round("choose", "fragments", ("answers",), ("verdicts",), self._choose),
        ]

    def _known(self, inbox: Inbox) -> Streams:
        table = pl.DataFrame(inbox.streams["pairs"])
        right = table.select("anchor", "document").unique()
        several = right.filter(pl.len().over("anchor") > 1)
        known = table.select("anchor", "fragment").unique().join(several, on="anchor").sort(pl.all())
        rows = pa.table([known["anchor"].to_arrow(), known["document"].to_arrow()], schema=KNOWN)
        return {"known": Routed(rows, known["fragment"].to_numpy())}

    def _search(self, inbox: Inbox) -> Streams:
        query, document = self.sides(inbox.kind)[0]
        queries, own = (vectors(inbox.columns.read(inbox.task, f"{view}_embedding")) for view in (query, document))
        wanted, owner = self._right(inbox)
        nearest = Nearest(queries, self.ranks[1])
        for tile, documents in self.documents(inbox, 0):
            nearest.add(documents, occurrences(wanted, owner, tile))
        rows = np.arange(len(queries))
        line = exact_scores(queries, rows, own, rows)[:, None]
        score, rank = nearest.score, np.arange(1, self.ranks[1] + 1)
        negative = np.isfinite(score) & (rank >= self.ranks[0]) & (score <= self._limit(line))
        negative &= score >= (-np.inf if self.min_score is None else self.min_score)
        positive = np.isfinite(score) & (score >= line) & (self.positives > 0)
        ids = id_words(inbox.columns.read(inbox.task, "id").to_pylist())
        tables = []
        for role, mask in ((NEGATIVE, negative & ~positive), (POSITIVE, positive)):
            row, place = np.nonzero(mask)
            words = nearest.ids[row, place]
            if role == POSITIVE:
                taken = first_of(row, place, self.positives)
            elif self.guide is None:
                taken = self._taken(row, place, words, ids[row], inbox.seed)
            else:
                taken = np.arange(len(row))
            row, place, words = row[taken], place[taken], words[taken]
            columns = [row.astype(np.int32), np.full(len(row), role, np.int8), place + 1, score[row, place]]
            columns += [words[:, 0], words[:, 1], nearest.refs[row, place], np.full(len(row), inbox.task)]
            tables.append(pa.table(columns, schema=ASKED))
        asked = pa.concat_tables(tables)
        return {"asked": Routed(asked, fragment_of(asked["ref"].to_numpy()))}

    def _right(self, inbox: Inbox) -> tuple[np.ndarray, np.ndarray]:
        """What is no negative of a row: digests, uint64 [n], and the row that each belongs to."""
        kind = inbox.kind
        query, document = self.sides(kind)[0]
        anchors, own = (digests(inbox.columns.read(inbox.task, holder(kind, view))) for view in (query, document))
        rows = np.arange(len(anchors))
        known = pl.DataFrame(inbox.streams["known"])
        others = pl.DataFrame({"anchor": anchors, "row": rows}).join(known, on="anchor")
        return (
            np.concatenate([own, anchors, others["document"].to_numpy()]),
            np.concatenate([rows, rows, others["row"].to_numpy()]),
        )

    def _limit(self, line: np.ndarray) -> np.ndarray:
        """The highest score of a negative, float64, from that of the positive."""
        limit = np.full_like(line, np.inf if self.max_score is None else self.max_score)
        if self.relative is not None:
            limit = np.minimum(limit, line - (1 - self.relative) * np.abs(line))
        if self.margin is not None:
            limit = np.minimum(limit, line - self.margin)
        return limit

    def _taken(self, row: np.ndarray, rank: np.ndarray, ids: np.ndarray, anchors: np.ndarray, seed: int) -> np.ndarray:
        """Which negatives are taken, ascending; ids are uint64 [n, 2] of the documents and of the rows' samples."""
        if self.choose == "nearest":
            return first_of(row, rank, self.count)
        key = np.uint64(xxhash.xxh3_64_intdigest(f"{seed}\0mine".encode()))
        return first_of(row, mix(ids[:, 0] ^ mix(anchors[:, 0] ^ key)), self.count)

    def _answer(self, inbox: Inbox) -> Streams:
        asked = inbox.streams["asked"]
        _, document = self.sides(inbox.kind)[0]
        places = pa.array(place_of(asked["ref"].to_numpy()))
        texts = inbox.columns.read(inbox.task, document).take(places)
        answers = pa.table([*(asked[name] for name, _ in FOUND), texts], schema=CHOSEN)
        return {"answers": Routed(answers, asked["asker"].to_numpy())}

    def _choose(self, inbox: Inbox) -> Streams:
        table = inbox.streams["answers"].sort_by([("row", "ascending"), ("role", "ascending"), ("rank", "ascending")])
        if self.guide is not None:
            ids = id_words(inbox.columns.read(inbox.task, "id").to_pylist())
            negative = table["role"].to_numpy() == NEGATIVE
            table, others = table.filter(pa.array(negative)), table.filter(pa.array(~negative))
            table = table.filter(pa.array(self._accepted(inbox, table)))
            row, rank, id0, id1 = (table[name].to_numpy() for name in ("row", "rank", "id0", "id1"))
            taken = self._taken(row, rank, np.stack([id0, id1], 1), ids[row], inbox.seed)
            table = pa.concat_tables([table.take(pa.array(taken)), others])
        return {"verdicts": Routed(table, np.full(table.num_rows, inbox.task))}

    def _accepted(self, inbox: Inbox, negatives: pa.Table) -> np.ndarray:
        """bool [n]: whether the guide holds each negative for less right than its row's positive."""
        encoder = Encoder(str(self.guide), batch_size=64, precision="fp32", threads=1)
        row = negatives["row"].to_numpy()
        rows, of = np.unique(row, return_inverse=True)

        def embedded(view: str, texts: list[str]) -> np.ndarray:
            return encoder.texts(view, texts).astype(np.float32)

        anchors, positives = (
            embedded(view, inbox.columns.read(inbox.task, view).take(pa.array(rows)).to_pylist())
            for view in ("anchor", "positive")
        )
        texts, which = np.unique(np.array(negatives["text"].to_pylist(), object), return_inverse=True)
        documents = embedded("positive", texts.tolist())
        right = exact_scores(anchors, np.arange(len(rows)), positives, np.arange(len(rows)))
        return exact_scores(anchors, of, documents, which) <= right[of] - self.guide_margin

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        columns: dict[str, Any] = {}
        for role, name in ((NEGATIVE, "mined"), (POSITIVE, "neighbour")):
            mine = reduced.filter(pa.array(reduced["role"].to_numpy() == role)).sort_by(
                [("row", "ascending"), ("rank", "ascending")]
            )
            counts = np.bincount(mine["row"].to_numpy(), minlength=len(rows))
            bounds = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
            ids = pa.array(id_text(np.stack([mine["id0"].to_numpy(), mine["id1"].to_numpy()], 1)), pa.string())
            values = {"texts": whole(mine["text"]), "ids": ids}
            if role == NEGATIVE:
                values |= {"scores": whole(mine["score"]).cast(pa.float32()), "ranks": whole(mine["rank"])}
                columns["mined_count"] = counts.astype(np.int32)
            if role == NEGATIVE or self.positives:
                columns |= {f"{name}_{what}": pa.ListArray.from_arrays(bounds, each) for what, each in values.items()}
        return Output(columns, reasons(len(rows), {"too_few_negatives": columns["mined_count"] < self.require}))


def first_of(row: np.ndarray, key: np.ndarray, count: int) -> np.ndarray:
    """int64, ascending: where the `count` smallest keys of each row stand."""
    order = np.lexsort((key, row))
    place = np.arange(len(order)) - np.searchsorted(row[order], row[order])
    return np.sort(order[place < count])
