"""Where kept samples go, in rounds of bounded tasks, against the layout of the whole corpus at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.errors import DataError
from pipelines.keyed import id_words, keyed_hash
from pipelines.placement import PLACED, ROWS, Placement, WriteConfig
from pipelines.plan import Step, build_plan
from pipelines.run_steps import FragmentView, run_steps
from pipelines.shuffle import EVERYONE
from pipelines.stages.keyed import Inbox
from tests.curation_corpora import reduce_here, text_corpus

IDS = [f"{number:032x}" for number in range(60)]
NO_COLUMNS: Any = None  # the rounds read none


def placed(lane: np.ndarray, size: np.ndarray, chunk: int, shard: int, partitions: int, fragments: int) -> pa.Table:
    """What the rounds say of samples that lie in fragments in turn; rows in the order of the samples."""
    stage = Placement(settings=WriteConfig(chunk_mib=chunk / 2**20, shard_mib=shard / 2**20))
    count, number = len(lane), np.arange(len(lane))
    ref = ((number % fragments) << 32) + number // fragments
    words = id_words(IDS[:count])
    columns = [ref, lane.astype(np.int32), keyed_hash(0, IDS[:count], "order"), words[:, 0], words[:, 1], size]

    def inbox(task: int, streams: dict[str, pa.Table]) -> Inbox:
        return Inbox(task, streams, partitions, NO_COLUMNS, "text-text", 0, fragments, lambda *_: pa.table({}))

    sent = {"rows": [(pa.table(columns, schema=ROWS), lane % partitions)]}
    for each in stage.rounds():
        written: dict[str, list[tuple[pa.Table, np.ndarray]]] = {name: [] for name in each.writes}
        for task in range(partitions if each.over == "partitions" else fragments):
            streams = {
                name: pa.concat_tables(
                    table.filter(pa.array((to == task) | (to == EVERYONE))) for table, to in sent[name]
                )
                for name in each.reads
            }
            for name, routed in each.run(inbox(task, streams)).items():
                written[name].append((routed.table, routed.to))
        sent |= written
    order = np.argsort(np.concatenate([np.arange(task, count, fragments) for task in range(fragments)]))
    return pa.concat_tables(table for table, _ in sent["verdicts"]).take(pa.array(order))


@given(
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 100)), min_size=1, max_size=60),
    chunk=st.integers(1, 300),
    shard=st.integers(1, 900),
    partitions=st.integers(1, 4),
    fragments=st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_lanes_chunks_and_shards(
    sizes: list[tuple[int, int]], chunk: int, shard: int, partitions: int, fragments: int
) -> None:
    lane, size = np.array([x for x, _ in sizes]), np.array([x for _, x in sizes], np.int64)
    found = placed(lane, size, chunk, shard, partitions, fragments)
    whole = placed(lane, size, chunk, shard, 1, 1)
    assert found.schema == PLACED
    shards, chunks, place, lanes = (column.to_numpy() for column in found.columns)
    assert (lanes == lane).all()
    keys = keyed_hash(0, IDS[: len(sizes)], "order")
    assert np.argsort(place).tolist() == sorted(range(len(sizes)), key=lambda row: (lane[row], keys[row], IDS[row]))
    order = np.argsort(place)
    lane, size, chunks, shards = lane[order], size[order], chunks[order], shards[order]
    assert shards[0] == 0
    assert set(np.diff(shards)) <= {0, 1}, "shards are numbered without a gap"
    for number in set(lane):
        mine = chunks[lane == number]
        assert mine[0] == 0
        assert set(np.diff(mine)) <= {0, 1}
        assert mine[-1] < -(-size[lane == number].sum() // chunk)
    pieces = sorted(set(zip(lane.tolist(), chunks.tolist(), strict=True)))
    bytes_of = {piece: size[(lane == piece[0]) & (chunks == piece[1])].sum() for piece in pieces}
    for piece in pieces:
        assert len(set(shards[(lane == piece[0]) & (chunks == piece[1])])) == 1, "a chunk lies in one shard"
        assert bytes_of[piece] < chunk + size.max() + 1
    for number in range(shards[-1] + 1):
        assert size[shards == number].sum() <= shard + max(bytes_of.values())
    assert found.equals(whole), "neither partitions nor fragments change a place"


def test_a_sample_that_is_there_twice_is_named(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path / "corpus", [[("a", "b")], [("c", "d")]])
    files = [tmp_path / "corpus" / "samples" / f"{number:05d}.parquet" for number in range(2)]
    shutil.copy(*files)
    plan = build_plan(corpus, [Placement(settings=WriteConfig())], str(tmp_path / "out"), 0)
    for number in range(2):
        run_steps(plan, [Step(0, "partial")], number, {})
    twice = pq.read_table(files[0])["id"][0].as_py()
    with pytest.raises(DataError, match=f"id {twice} twice"):
        reduce_here(plan, 0)


def test_every_row_of_a_plan_gets_a_place(tmp_path: Path) -> None:
    pairs = [(f"anchor {number}", f"positive {number}") for number in range(21)]
    corpus = text_corpus(tmp_path / "corpus", [pairs[:20], [], pairs[20:]])
    plan = build_plan(corpus, [Placement(settings=WriteConfig(lanes=3))], str(tmp_path / "out"), 0, partitions=2)
    for action in ("partial", "apply"):
        for number in range(3):
            run_steps(plan, [Step(0, action)], number, {})
        if action == "partial":
            reduce_here(plan, 0)
    places = [FragmentView(plan, number).made(0, "place").to_pylist() for number in range(3)]
    assert [len(each) for each in places] == [20, 0, 1]
    assert sorted(place for each in places for place in each) == list(range(21))
