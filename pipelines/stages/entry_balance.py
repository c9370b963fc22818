"""MetaCLIP's balance: common concepts are thinned out, rare ones stay.

Xu et al. 2024, "Demystifying CLIP Data": with count_e the texts that mention entry e, every mention is kept with the
probability p_e = min(1, t / count_e), and a text stays if any of its mentions is kept:

    P(text stays) = 1 - prod over its entries (1 - p_e)

The coin of a mention is a keyed hash of (entry, id), so that neither order nor number of workers matters, and a larger
t keeps all that a smaller one kept.

Per language, as in Chuang et al. 2025, "Meta CLIP 2: A Worldwide Scaling Recipe": counts are of texts in the language,
and t is set for each language such that its tail, the mentions of entries below t, is as large a share of its mentions
as it is in the reference language: the largest t whose tail share does not exceed that of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field

from cl.corpus import Kind
from cl.errors import DataError
from pipelines.keyed import id_words, mix
from pipelines.stages.base import Context, GlobalStage, Output, Rows, reasons, whole
from pipelines.stages.registry import STAGES

COUNTS = pa.schema([("language", pa.string()), ("entry", pa.int32()), ("count", pa.int64())])
REDUCED = pa.schema([("language", pa.string()), ("entry", pa.int32()), ("probability", pa.float64())])


def tail_share(counts: np.ndarray, t: int) -> float:
    """Share of the mentions that are of entries with fewer than t."""
    return float(counts[counts < t].sum() / max(counts.sum(), 1))


def largest_t(counts: np.ndarray, share: float) -> int:
    """The largest t whose tail share does not exceed `share`."""
    values, number = np.unique(counts, return_counts=True)
    over = np.cumsum(values * number) > share * counts.sum() * (1 + 1e-12)
    return int(values[over.argmax()]) if over.any() else int(values.max(initial=0)) + 1


def coins(seed: int, entries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """float64 [n] in [0, 1): the coin of each mention of an entry, int32 [n], by an id, uint64 [n, 2]."""
    key = np.uint64(xxhash.xxh3_64_intdigest(f"{seed}\0entry_balance".encode()))
    mixed = mix(mix(mix(ids[:, 0] ^ key) + ids[:, 1]) + entries.astype(np.uint64))
    return (mixed >> np.uint64(11)) * 2.0**-53


@STAGES.register(
    "entry_balance",
    "MetaCLIP's balance over the entries of entry_match: keep a text with the probability that its rarest entries give",
    "Demystifying CLIP Data",
)
class EntryBalance(GlobalStage):
    """The reduction holds 12 bytes an entry and language and one fragment's counts, whatever the number of rows."""

    drops: ClassVar[bool] = True
    seeded: ClassVar[bool] = True
    frozen: ClassVar[Literal["statistics"]] = "statistics"

    t: int = Field(20_000, ge=1, description="mentions of an entry that are kept on average; 20k suits 400M pairs")
    language: str | None = Field(None, description="text column with the language, to balance in each by itself")
    reference: str = Field("en", description="language whose tail share at t the others follow")

    def needs(self, kind: Kind) -> list[str]:
        return ["entries"] + ([self.language] if self.language else [])

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field("entry_probability", pa.float32())]

    def _mentions(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, pa.Array]:
        """Entry and row of every mention, and the language of every row."""
        lists = whole(rows.table["entries"])
        sizes = np.diff(lists.offsets.to_numpy())
        language = rows.strings(self.language) if self.language else pa.array([""] * len(rows), pa.string())
        return lists.flatten().to_numpy(), np.repeat(np.arange(len(rows)), sizes), language

    def partial(self, rows: Rows) -> pa.Table:
        entries, row, language = self._mentions(rows)
        mentions = pa.table({"language": language.take(pa.array(row)), "entry": pa.array(entries, pa.int32())})
        counted = mentions.group_by(["language", "entry"]).aggregate([([], "count_all")])
        renamed = counted.rename_columns({"count_all": "count"}).select(COUNTS.names)
        return renamed.cast(COUNTS).sort_by([("language", "ascending"), ("entry", "ascending")])

    def reduce(self, partials: Sequence[pa.Table], context: Context) -> pa.Table:
        total: dict[str, np.ndarray] = {}
        for partial in partials:
            for language in partial["language"].unique().to_pylist():
                part = partial.filter(pc.equal(partial["language"], language))
                entries = part["entry"].to_numpy()
                before = total.get(language, np.zeros(0, np.int64))
                grown = np.zeros(max(len(before), int(entries.max()) + 1), np.int64)
                grown[: len(before)] = before
                grown[entries] += part["count"].to_numpy()
                total[language] = grown
        if self.language and total and self.reference not in total:
            raise DataError(
                f"Stage 'entry_balance': no text of the reference language {self.reference!r} is left in column "
                f"{self.language!r}; there are {', '.join(sorted(total))}."
            )
        share = tail_share(total[self.reference], self.t) if self.language and total else 0.0
        tables = [REDUCED.empty_table()]
        for language, counts in sorted(total.items()):
            some = np.flatnonzero(counts)
            alone = not self.language or language == self.reference
            t = self.t if alone else largest_t(counts[some], share)
            probability = np.minimum(t / counts[some], 1)
            tables.append(pa.table([[language] * len(some), some.astype(np.int32), probability], schema=REDUCED))
        return pa.concat_tables(tables)

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        entries, row, language = self._mentions(rows)
        probability = np.ones(len(entries))  # of an entry that no text had: only in a frozen balance
        names = np.array(language.to_pylist(), dtype=object)[row]
        for name in set(names.tolist()):
            part = reduced.filter(pc.equal(reduced["language"], name))
            here = np.flatnonzero(names == name)
            place = np.searchsorted(part["entry"].to_numpy(), entries[here])
            known = np.append(part["entry"].to_numpy(), -1)[place] == entries[here]
            probability[here[known]] = part["probability"].to_numpy()[place[known]]
        ids = id_words(rows.table["id"].to_pylist())
        kept = np.zeros(len(rows), bool)
        kept[row[coins(rows.seed, entries, ids[row]) < probability]] = True
        # log(1 - p) is -inf where p is 1: then the text stays for sure.
        with np.errstate(divide="ignore"):
            stays = 1 - np.exp(np.bincount(row, np.log1p(-probability), minlength=len(rows)))
        output = {"entry_probability": stays.astype(np.float32)}
        return Output(output, reasons(len(rows), {"entry_over_cap": ~kept}))
