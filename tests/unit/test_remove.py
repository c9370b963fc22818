"""Takedown: what is removed is gone from every file, stays gone, and a kill at any moment leaves nothing half done."""

from __future__ import annotations

import io
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cl.batches.plan import BatchPlan
from cl.corpus import Corpus, open_corpus, sample_id, text_pair_content
from cl.errors import ConfigError, DataError
from cl.tombstones import read_tombstones
from pipelines.ingest import IngestConfig, ingest, ingest_tasks
from pipelines.remove import remove
from pipelines.shards import ingest_shard
from pipelines.verify import verify
from tests.curation_corpora import run_plan
from tests.unit.corpora import encoded_image, image_corpus, text_corpus


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def listed(tmp_path: Path, ids: list[str]) -> str:
    path = tmp_path / "ids.txt"
    path.write_text("# taken down\n" + "\n".join(ids) + "\n\n")
    return str(path)


def in_process(cfg: IngestConfig) -> Any:
    """Ingest without Ray: do the tasks here; with nothing left to do `ingest` itself only commits."""
    for task in ingest_tasks(cfg)[0]:
        if task.done() is None:
            ingest_shard(task)
    return ingest(cfg)


def raw(folder: Path, shards: int = 3, count: int = 8) -> None:
    folder.mkdir(parents=True)
    for number in range(shards):
        with tarfile.open(folder / f"s-{number}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for each in range(count):
                for suffix, data in (
                    ("jpg", encoded_image(each, 40, 30)),
                    ("txt", f"picture {number} {each}".encode()),
                ):
                    member = tarfile.TarInfo(f"{each}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def test_only_what_is_affected_is_rewritten_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    corpus = image_corpus(tmp_path / "c", fragments=3, rows=12, row_group=5)
    before, rows = files(tmp_path / "c"), corpus.read().to_pylist()
    images = {row["id"]: before[row["shard"]][row["offset"] : row["offset"] + row["length"]] for row in rows}
    gone = [rows[number]["id"] for number in (1, 12, 13, 14, 15, 16)]
    [result] = remove([corpus.root], listed(tmp_path, [*gone, "0" * 32]))
    assert (result.removed, result.unknown, result.tombstones, result.fragments, result.shards) == (6, 1, 7, 2, 2)
    assert verify(corpus.root, deep=True).defects == []
    after, left = files(tmp_path / "c"), open_corpus(corpus.root)
    assert [fragment.row_groups for fragment in left.fragments] == [[4, 5, 2], [5, 2], [5, 5, 2]]
    kept = left.read().to_pylist()
    same = [name for name in rows[0] if name not in ("shard", "offset")]
    wanted = [row for row in rows if row["id"] not in gone]
    assert [[row[name] for name in same] for row in kept] == [[row[name] for name in same] for row in wanted]
    for row in kept:
        assert after[row["shard"]][row["offset"] : row["offset"] + row["length"]] == images[row["id"]]
    for path in ("samples/00002.parquet", "shards/00002.tar"):
        assert after[path] == before[path]
    for name, data in after.items():
        for each in gone:
            assert images[each] not in data
            assert each.encode() not in data or name == "tombstones.parquet"
    for fragment in left.fragments:
        with tarfile.open(tmp_path / "c" / fragment.shard) as tar:
            names = [member.name for member in tar]
        assert len(names) == 2 * fragment.samples
    assert read_tombstones(corpus.root) == sorted([*gone, "0" * 32])
    [again] = remove([corpus.root], listed(tmp_path, gone))
    assert (again.removed, again.fragments, again.tombstones) == (0, 0, 7)
    assert files(tmp_path / "c") == after
    plan = BatchPlan([left], 0, 8)
    assert plan.samples == 30


def test_ingest_does_not_bring_back_what_was_removed(tmp_path: Path) -> None:
    raw(tmp_path / "raw")
    cfg = IngestConfig(inputs=[str(tmp_path / "raw")], out=str(tmp_path / "c"))
    assert in_process(cfg).samples == 24
    gone = [sample_id("s", key) for key in ("s-0/3", "s-1/0", "s-1/7", "s-9/0")]
    [result] = remove([cfg.out], listed(tmp_path, gone))
    assert (result.removed, result.unknown) == (3, 1)
    assert result.left_in == [str(tmp_path / "raw" / f"s-{number}.tar") for number in (0, 1)]
    assert verify(cfg.out, deep=True).defects == []
    after = files(tmp_path / "c" / "samples")
    again = ingest(cfg)
    assert (again.samples, again.quarantined, again.reasons, again.reused) == (21, 3, {"removed": 3}, 3)
    assert files(tmp_path / "c" / "samples") == after
    shutil.copy(tmp_path / "raw" / "s-2.tar", tmp_path / "raw" / "s-9.tar")  # a removed id comes for the first time
    os.utime(tmp_path / "raw" / "s-1.tar", (1, 1))  # and a shard is read anew
    more = in_process(cfg)
    assert (more.samples, more.reasons) == (28, {"removed": 4})
    assert not {row["id"] for row in open_corpus(cfg.out).read().to_pylist()} & set(gone)
    assert verify(cfg.out, deep=True).defects == []
    [whole] = remove([cfg.out], listed(tmp_path, [sample_id("s", f"s-2/{number}") for number in range(8)]))
    assert whole.removed == 8
    assert len(open_corpus(cfg.out).fragments) == 3, "a fragment without samples is none"
    assert ingest(cfg).samples == 20


def test_texts_leave_the_negatives_of_others_and_the_annotated_rows(tmp_path: Path) -> None:
    pairs = [(f"question {i}", f"answer {i} of the list") for i in range(9)]
    corpus = text_corpus(tmp_path / "c", pairs=pairs, row_group=4)
    path = tmp_path / "c" / "samples" / "00000.parquet"
    table = pq.read_table(path)
    ids = table["id"].to_pylist()
    mined = [[(i + 1) % 9, (i + 2) % 9] for i in range(9)]
    negatives = pa.array([[pairs[j][1] for j in each] for each in mined], pa.list_(pa.string()))
    table = table.set_column(table.schema.get_field_index("negatives"), "negatives", negatives)
    names = pa.array([[ids[j] for j in each] for each in mined], pa.list_(pa.string()))
    near = [[pairs[(i + 3) % 9][1], "another"] for i in range(9)]  # as long as the negatives, but of their own
    table = table.append_column("mined_ids", names)
    table = table.append_column("neighbour_texts", pa.array(near, pa.list_(pa.string())))
    pq.write_table(table, path, row_group_size=4)
    run_plan(corpus, tmp_path / "o", [{"caption": {"min_words": 2}}])
    shutil.move(tmp_path / "o" / "annotated", tmp_path / "c" / "annotated")
    remove([corpus.root], listed(tmp_path, [ids[4]]))
    rows = open_corpus(corpus.root).read().to_pylist()
    for row, number in zip(rows, [0, 1, 2, 3, 5, 6, 7, 8], strict=True):
        assert row["negatives"] == [pairs[j][1] for j in mined[number] if j != 4]
        assert row["mined_ids"] == [ids[j] for j in mined[number] if j != 4]
        assert row["neighbour_texts"] == [text for text in near[number] if text != pairs[4][1]]
        assert row["content"] == text_pair_content(*pairs[number])
    for data in files(tmp_path / "c").values():
        assert b"answer 4 of the list" not in data
    annotated = pq.read_table(tmp_path / "c" / "annotated" / "00000.parquet").to_pylist()
    assert (annotated[4]["id"], annotated[4]["drop_stage"], annotated[4]["drop_reason"]) == (
        ids[4],
        "remove",
        "removed",
    )
    assert (annotated[4]["anchor"], annotated[4]["anchor_words"]) == ("", None)
    assert annotated[5]["anchor"] == "question 5"
    assert verify(corpus.root).defects == []


def killed_at(call: int, act: Callable[[], Any]) -> bool:
    """Do something in a process that dies just before its n-th rename or deletion of a file; whether it died."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count > call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return wrapped

        os.replace, os.remove = counted(os.replace), counted(os.remove)
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_any_moment_it_ends_the_same_and_nobody_reads_what_is_half_done(tmp_path: Path) -> None:
    def made(name: str) -> Corpus:
        return image_corpus(tmp_path / name, fragments=2, rows=5, row_group=3)

    one = made("one")
    ids = one.read(["id"])["id"].to_pylist()
    gone = listed(tmp_path, [ids[0], ids[7]])
    remove([one.root], gone)
    wanted = files(tmp_path / "one")
    states = set()
    for call in range(40):
        shutil.rmtree(tmp_path / "two", ignore_errors=True)
        two = made("two")
        died = killed_at(call, partial(remove, [two.root], gone))
        if (tmp_path / "two" / "removing.json").exists():
            states.add(len(files(tmp_path / "two")))
            with pytest.raises(DataError, match="is not finished: run the same `clew remove` again first"):
                open_corpus(two.root)
        elif call:
            assert not died
        remove([two.root], gone)
        assert files(tmp_path / "two") == wanted
        if not died:
            break
    assert call > 8
    assert len(states) > 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no id in it"),
        ("0" * 32 + "\nxyz\n", "line 2: 'xyz' is no id of 32 hex digits"),
        (None, "does not exist"),
    ],
)
def test_files_that_name_no_samples_are_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    corpus = text_corpus(tmp_path / "c", rows=4)
    if text is not None:
        (tmp_path / "ids").write_text(text)
    before = files(tmp_path / "c")
    with pytest.raises(ConfigError, match=sentence):
        remove([corpus.root], str(tmp_path / "ids"))
    assert files(tmp_path / "c") == before
