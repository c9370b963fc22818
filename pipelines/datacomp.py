"""DataComp's files: its metadata tables in, its subset files out and in (Gadre et al. 2023).

    uids = select_uids(["metadata/"], minimum={"clip_b32_similarity_score": 0.28})
    write_subset("subset.npy", uids)

A uid is 128 bits, 32 hex digits in the metadata's column `uid` and in the `json` of each sample. A subset file is a
numpy array of dtype "u8,u8" in lexicographic order, which DataComp's resharder searches by bisection: the bytes are
those of `numpy.save`. Clew reads it with the stage `subset`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from cl import storage
from cl.corpus import open_corpus
from cl.errors import ConfigError, DataError
from pipelines.inputs import find_shards

UID = np.dtype("u8,u8")
HEX = "^[0-9a-fA-F]{1,32}$"


class SubsetResult(BaseModel):
    """What a subset file holds."""

    out: str
    uids: int  # distinct
    rows: int  # looked at
    without_uid: int  # samples of a corpus whose metadata has no uid


def parse_uids(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """UID [n] of hex digits; leading zeros may be missing.

    Raises:
        DataError: a value that is no uid.
    """
    good = pc.fill_null(pc.match_substring_regex(column, HEX), False)
    if not pc.all(good).as_py() and len(column):
        bad = column.filter(pc.invert(good))[0].as_py()
        raise DataError(f"{where}: uid {bad!r:.60} is not a number of up to 32 hex digits.")
    digits = "".join(pc.ascii_lpad(column, 32, "0").to_pylist())
    words = np.frombuffer(bytes.fromhex(digits), ">u8").reshape(-1, 2)
    out = np.empty(len(words), UID)
    out["f0"], out["f1"] = words[:, 0], words[:, 1]
    return out


def read_metadata(inputs: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """(file, `uid` and some columns) of each row group of metadata files, folders or globs.

    Raises:
        DataError: no parquet file, or a column is not there.
    """
    for shard in find_shards(list(inputs), "text-text", "metadata")[0]:
        if shard.format != "parquet":
            raise DataError(f"{shard.url} is no parquet file, as DataComp's metadata are.")
        with storage.open_parquet(shard.url) as file:
            names = file.schema_arrow.names
            for name in ("uid", *columns):
                if name not in names:
                    raise DataError(f"{shard.url} has no column {name!r}; it has {', '.join(names)}.")
            for group in range(file.num_row_groups):
                yield shard.url, file.read_row_group(group, columns=["uid", *columns])


def select_uids(
    inputs: Sequence[str],
    minimum: Mapping[str, float] | None = None,
    maximum: Mapping[str, float] | None = None,
    top: tuple[str, float] | None = None,
) -> tuple[np.ndarray, int]:
    """The distinct uids of metadata files whose rows pass, UID [n] ascending, and how many rows there were.

    Args:
        minimum, maximum: column -> bound, itself allowed; null and NaN pass neither.
        top: column and fraction: of the n rows that pass the bounds the round(fraction x n) with the highest values,
            ties to the smaller uid. Holds 24 bytes a row.

    Raises:
        DataError: a file, a column or a uid that cannot be used.
    """
    low, high = dict(minimum or {}), dict(maximum or {})
    wanted = list(dict.fromkeys([*low, *high, *([top[0]] if top else [])]))
    found, values, rows = [np.zeros(0, UID)], [np.zeros(0)], 0
    for url, table in read_metadata(inputs, wanted):
        rows += table.num_rows
        numbers = {name: _numbers(table, name, url) for name in wanted}
        good = np.ones(table.num_rows, bool)
        for name, bound in low.items():
            good &= numbers[name] >= bound
        for name, bound in high.items():
            good &= numbers[name] <= bound
        if top:
            good &= ~np.isnan(numbers[top[0]])
            values.append(numbers[top[0]][good])
        found.append(parse_uids(table["uid"], url)[good])
    uids = np.concatenate(found)
    if top:
        order = np.lexsort((uids["f1"], uids["f0"], -np.concatenate(values)))
        uids = uids[order[: round(top[1] * len(order))]]
    return distinct(uids), rows


def _numbers(table: pa.Table, name: str, url: str) -> np.ndarray:
    """float64 [n], NaN for null."""
    kind = table.schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{url}: column {name!r} is {kind}, expected numbers.")
    return np.asarray(table[name].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def meta_uids(meta: pa.ChunkedArray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """UID [n] of samples' own metadata (JSON text), and which have one, bool [n]."""
    texts = [(orjson.loads(text) or {}).get("uid") if text and '"uid"' in text else None for text in meta.to_pylist()]
    has = np.array([text is not None for text in texts], bool)
    out = np.zeros(len(texts), UID)
    out[has] = parse_uids(
        pa.chunked_array([pa.array([str(text) for text in texts if text is not None], pa.string())]), where
    )
    return out, has


def distinct(uids: np.ndarray) -> np.ndarray:
    """UID [n] in lexicographic order, each once."""
    order = np.lexsort((uids["f1"], uids["f0"]))
    uids = uids[order]
    new = np.ones(len(uids), bool)
    new[1:] = uids[1:] != uids[:-1]
    return uids[new]


def write_subset(url: str, uids: np.ndarray) -> None:
    """Write UID [n], ascending, as DataComp's resharder reads it."""
    with storage.atomic_write(url) as file:
        np.save(file, uids)


def read_subset(url: str) -> np.ndarray:
    """UID [n], ascending, of a subset file in npy format or, as the resharder also takes, of plain numbers.

    Raises:
        DataError: no such file, or another dtype.
    """
    fs, path = storage.open_fs(url)
    try:
        data = bytes(fs.cat_file(path))
    except FileNotFoundError as error:
        raise DataError(f"Subset file {url} does not exist.") from error
    if data[:6] != b"\x93NUMPY":
        if len(data) % 16:
            raise DataError(f"{url} is no subset file: neither npy nor a whole number of 16-byte uids.")
        return distinct(np.frombuffer(data, UID))
    try:
        with fs.open(path, "rb") as file:
            uids = np.load(file, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{url} is not a readable npy file: {error}.") from error
    if uids.dtype != UID or uids.ndim != 1:
        raise DataError(
            f"{url} holds {uids.dtype} of shape {list(uids.shape)}, but a subset is 'u8,u8' of one dimension."
        )
    return distinct(uids)


def subset(
    inputs: Sequence[str],
    out: str,
    minimum: Mapping[str, float] | None = None,
    maximum: Mapping[str, float] | None = None,
    top: tuple[str, float] | None = None,
) -> SubsetResult:
    """`clew subset`: the uids of a corpus's samples, or of the metadata rows that pass, as a subset file.

    Raises:
        ConfigError: bounds for a corpus, whose selection is the business of `clew curate`.
        DataError: what `select_uids` raises; a corpus of which no sample has a uid.
    """
    if not storage.exists(storage.join(inputs[0], "corpus.json")):
        uids, rows = select_uids(inputs, minimum, maximum, top)
        write_subset(out, uids)
        return SubsetResult(out=out, uids=len(uids), rows=rows, without_uid=0)
    if minimum or maximum or top:
        raise ConfigError(f"{inputs[0]} is a corpus, of which all samples are written: select with `clew curate`.")
    found, without = [np.zeros(0, UID)], 0
    for corpus in map(open_corpus, inputs):
        for fragment in corpus.fragments:
            url = corpus.fragment_url(fragment)
            uids, has = meta_uids(storage.read_table(url, ["meta"])["meta"], url)
            found.append(uids[has])
            without += int((~has).sum())
    uids = distinct(np.concatenate(found))
    if not len(uids):
        raise DataError(f"No sample of {inputs[0]} has a uid in its metadata: it is not of DataComp's pools.")
    write_subset(out, uids)
    return SubsetResult(out=out, uids=len(uids), rows=sum(map(len, found)) + without, without_uid=without)
