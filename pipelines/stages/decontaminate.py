"""Samples that also stand in evaluation sets, so that a score on those measures learning and not memory.

Three stages, each against a list of corpora (the output of `clew ingest`), by what they compare:

    decontaminate_text       n-grams of words: PaLM (Chowdhery et al. 2022, section 8) calls an example contaminated if
                             70 % of its 8-grams were found in the training text
    decontaminate_image      perceptual hash (Zauner 2010) and thumbnail, as `near_duplicate` does
    decontaminate_embedding  cosine of embeddings, as LAION-5B and DataComp do against their evaluation sets

The evaluation sets are far smaller than the corpus: one task makes an index of them, which every fragment gets. An
evaluation sample is looked for as a whole in one training sample; several evaluation sets are one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from cl import storage
from cl.corpus import VIEWS, Corpus, Kind, open_corpus
from cl.errors import ConfigError, DataError
from pipelines.heavy import UndecodableError, decode, read_rows
from pipelines.paths import absolute
from pipelines.shingles import Words, blocks, distinct
from pipelines.stages.base import Context, GlobalStage, Output, Rows, Stage, internal, reasons, text_fields, vectors
from pipelines.stages.perceptual_hash import PerceptualHash, perceptual_hash
from pipelines.stages.registry import STAGES

PICTURES = pa.schema([("id", pa.string()), ("phash", pa.uint64()), ("thumbnail", pa.binary())])
MARKER = ".embed.json"  # says by what an output of `clew embed` was made
COMPARED = 1 << 22  # pairs compared at a time


class Decontaminate(GlobalStage):
    """Base: an index of the evaluation corpora by one task, and for each row the evaluation sample that it holds."""

    drops: ClassVar[bool] = True
    frozen: ClassVar[Literal["anew"]] = "anew"
    unkeyed: ClassVar[frozenset[str]] = frozenset({"against"})  # the digest stands for what the corpora hold

    against: tuple[str, ...] = Field(description="evaluation corpora: folders or URLs that clew ingest wrote")

    @field_validator("against")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("give at least one evaluation corpus")
        return value

    def resolve(self, model: str | None, kind: Kind) -> Stage:
        return self.model_copy(update={"against": tuple(map(absolute, self.against))})

    def digest(self) -> str:
        from pipelines.plan import corpus_digest

        return "\0".join(corpus_digest(corpus) for corpus in self.corpora())

    def corpora(self) -> list[Corpus]:
        return [open_corpus(path) for path in self.against]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [internal(f"{self.name}_of", pa.string()), internal(f"{self.name}_score", pa.float32())]

    def partial(self, rows: Rows) -> pa.Table:
        return pa.table({"rows": [len(rows)]})

    def reduce(self, partials: Sequence[pa.Table], context: Context) -> pa.Table:
        return pa.concat_tables(self.index(context.kind))

    @abstractmethod
    def index(self, kind: Kind) -> Iterator[pa.Table]:
        """The evaluation samples: `id`, and what is compared."""

    @abstractmethod
    def find(self, rows: Rows, index: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """For each row the place in the index of what it holds, or -1, int64 [n], and how sure that is, float32 [n]."""

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        place, score = self.find(rows, reduced)
        found = place >= 0
        known = pa.array(place, mask=~found)
        columns: dict[str, Any] = {
            f"{self.name}_of": reduced["id"].take(known),
            f"{self.name}_score": pa.array(score, pa.float32(), mask=~found),
        }
        return Output(columns, reasons(len(rows), {"contaminated": found}))


def embeddings_digest(stage: str, against: Sequence[str]) -> str:
    """What outputs of `clew embed` depend on.

    Raises:
        ConfigError: a folder is none.
    """
    markers = [storage.join(path, MARKER) for path in against]
    for path, marker in zip(against, markers, strict=True):
        if not storage.exists(marker):
            raise ConfigError(f"Stage {stage!r}: {path} is no output of `clew embed`.")
    return "\0".join(str(storage.read_json(marker)) for marker in markers)


def first_best(row: np.ndarray, place: np.ndarray, score: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Of matches (row, place in the index, score) the one with the highest score for each row, ties: the first."""
    order = np.lexsort((place, -score, row))
    first = order[np.diff(row[order], prepend=-1) != 0]
    out, value = np.full(rows, -1, np.int64), np.zeros(rows, np.float32)
    out[row[first]], value[row[first]] = place[first], score[first]
    return out, value


@STAGES.register(
    "decontaminate_text",
    "Drop samples with a text that holds most of the n-grams of an evaluation text",
    "PaLM: Scaling Language Modeling with Pathways",
)
class DecontaminateText(Decontaminate):
    """An evaluation text of fewer than `ngram` words is one n-gram: it is found in a text of the same words alone.

    A task holds the index, 12 bytes an n-gram of the evaluation texts, and the n-grams of a megabyte of texts.
    """

    ngram: int = Field(8, ge=1, le=64, description="words of an n-gram; captions of ten words want 3")
    min_share: float = Field(0.7, gt=0, le=1, description="share of an evaluation text's n-grams that a text must hold")
    min_words: int = Field(4, ge=1, description="words that an evaluation text must have to be looked for")

    def needs(self, kind: Kind) -> list[str]:
        return text_fields(kind)

    def index(self, kind: Kind) -> Iterator[pa.Table]:
        for corpus in self.corpora():
            for fragment in corpus.fragments:
                table = storage.read_table(corpus.fragment_url(fragment), ["id", *text_fields(corpus.kind)])
                for name in text_fields(corpus.kind):
                    words = Words(Rows(table, np.zeros(0), 0, corpus).strings(name))
                    values, bounds = distinct(*words.shingles(self.ngram))
                    lists = pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), pa.array(values, pa.uint64()))
                    long = pa.array(np.diff(words.bounds) >= self.min_words)
                    yield pa.table({"id": table["id"], "ngrams": lists}).filter(long)

    def find(self, rows: Rows, index: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        lists = index["ngrams"].combine_chunks()
        sizes = np.asarray(pc.list_value_length(lists).to_numpy(zero_copy_only=False), np.int64)
        grams = lists.flatten().to_numpy()
        order = np.argsort(grams, kind="stable")
        grams, owner = grams[order], np.repeat(np.arange(len(sizes)), sizes)[order]
        matches = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
        for name in text_fields(rows.corpus.kind):
            start = 0
            for texts in blocks(rows.strings(name)):
                values, bounds = distinct(*Words(texts).shingles(self.ngram))
                row = np.repeat(np.arange(len(texts)), np.diff(bounds))
                low, high = np.searchsorted(grams, values), np.searchsorted(grams, values, side="right")
                held = np.repeat(row * len(sizes), high - low) + owner[_ranges(low, high)]
                pair, count = np.unique(held, return_counts=True)
                share = count / sizes[pair % len(sizes)] if len(pair) else np.zeros(0)
                good = share >= self.min_share
                matches.append((start + pair[good] // len(sizes), pair[good] % len(sizes), share[good]))
                start += len(texts)
        row, place, share = (np.concatenate(parts) for parts in zip(*matches, strict=True))
        return first_best(row, place, share, len(rows))


@STAGES.register(
    "decontaminate_image",
    "Drop samples whose picture looks like one of an evaluation set: perceptual hash, verified on a thumbnail",
    "Implementation and Benchmarking of Perceptual Image Hash Functions",
)
class DecontaminateImage(Decontaminate):
    """The score is the number of equal bits of 64. A row is compared with every evaluation picture, of which there are
    few beside the corpus: that costs less than its decoding up to a million of them. A task holds 200 bytes of each.

    With the defaults 299 of 300 of the drawings that ship with Clew are found again after enlargement or re-encoding as
    JPEG or WebP; `near_duplicate` is stricter, as it must not drop what is merely alike.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("image-text",)

    max_distance: int = Field(12, ge=0, le=24, description="bits of 64 in which two hashes may differ")
    max_difference: int = Field(
        32, ge=0, le=255, description="levels of 255 by which any pixel of two 8 x 8 thumbnails may differ"
    )

    def before(self, kind: Kind) -> list[Stage]:
        return [PerceptualHash()]

    def needs(self, kind: Kind) -> list[str]:
        return ["phash", "thumbnail"]

    def corpora(self) -> list[Corpus]:
        opened = super().corpora()
        for corpus in opened:
            if corpus.kind != "image-text":
                raise ConfigError(f"Stage {self.name!r}: {corpus.root} is a {corpus.kind} corpus without pictures.")
        return opened

    def index(self, kind: Kind) -> Iterator[pa.Table]:
        for corpus in self.corpora():
            for fragment in corpus.fragments:
                table = storage.read_table(corpus.fragment_url(fragment), ["id", "shard", "offset", "length"])
                known, hashes, thumbnails = [], [], []
                for name, data in zip(table["id"].to_pylist(), read_rows(corpus, table), strict=True):
                    try:
                        value, thumbnail = perceptual_hash(decode(data or b""))
                    except UndecodableError:  # what cannot be decoded is no evaluation sample either
                        continue
                    known.append(name)
                    hashes.append(value)
                    thumbnails.append(thumbnail)
                yield pa.table([known, np.array(hashes, np.uint64), thumbnails], schema=PICTURES)

    def find(self, rows: Rows, index: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        mine, theirs = rows.table["phash"].to_numpy(), index["phash"].to_numpy()
        pixels, other = _pixels(rows.table["thumbnail"]), _pixels(index["thumbnail"])
        found = [np.zeros((0, 2), np.int64)]
        step = max(COMPARED // max(len(theirs), 1), 1)
        for start in range(0, len(mine), step):
            close = np.argwhere(np.bitwise_count(mine[start : start + step, None] ^ theirs) <= self.max_distance)
            close[:, 0] += start
            found.append(close)
        row, place = np.concatenate(found).T
        distance = np.bitwise_count(mine[row] ^ theirs[place]).astype(np.int64)
        near = np.abs(pixels[row] - other[place]).max(1, initial=0) <= self.max_difference
        return first_best(row[near], place[near], 64.0 - distance[near], len(mine))


@STAGES.register(
    "decontaminate_embedding",
    "Drop samples whose embedding nearly equals that of an evaluation sample",
    "LAION-5B: An open large-scale dataset for training next generation image-text models",
)
class DecontaminateEmbedding(Decontaminate):
    """`against` are outputs of `clew embed` by the model of the stage `embedding`.

    A task holds the index, 4 bytes a number, and the cosines of a part of its rows with all of it.
    """

    column: str | None = Field(None, description="embedding; None: image_embedding, or anchor_embedding of text pairs")
    threshold: float = Field(0.95, gt=0, le=1, description="cosine from which a sample is one of the evaluation set")

    def digest(self) -> str:
        return embeddings_digest(self.name, self.against)

    def _column(self, kind: Kind) -> str:
        return self.column or f"{next(iter(VIEWS[kind]))}_embedding"

    def needs(self, kind: Kind) -> list[str]:
        return [self._column(kind)]

    def index(self, kind: Kind) -> Iterator[pa.Table]:
        column = self._column(kind)
        for path in self.against:
            for name in storage.list_files(path, ".parquet"):
                yield storage.read_table(storage.join(path, name), ["id", column]).rename_columns(["id", "point"])

    def find(self, rows: Rows, index: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        points, known = rows.vectors(self._column(rows.corpus.kind)), vectors(index["point"])
        if points.shape[1] != known.shape[1]:
            raise DataError(
                f"Stage {self.name!r}: the evaluation embeddings have {known.shape[1]} dimensions, those of the corpus "
                f"{points.shape[1]}: both must be by the same model."
            )
        place, score = np.full(len(points), -1, np.int64), np.zeros(len(points), np.float32)
        step = max(COMPARED // max(len(known), 1), 1)
        for start in range(0, len(points), step):
            cosine = points[start : start + step] @ known.T
            best = cosine.argmax(1)
            value = cosine[np.arange(len(best)), best]
            place[start : start + step] = np.where(value >= self.threshold, best, -1)
            score[start : start + step] = value
        return place, score


def _ranges(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """int64: low[0] ... high[0] - 1, low[1] ... high[1] - 1, and so on."""
    sizes = high - low
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(low, sizes) + np.arange(len(first)) - first


def _pixels(column: pa.ChunkedArray) -> np.ndarray:
    """Thumbnails, int16 [n, bytes]."""
    values = column.to_pylist()
    return np.frombuffer(b"".join(values), np.uint8).reshape(len(values), -1 if values else 1).astype(np.int16)
