"""Labels: columns of the light plane in every worker's batches, with codes that never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from blake3 import blake3

from cl import storage
from cl.batches.batch import Batch
from cl.batches.labels import LabelConfig, code_of, open_labels
from cl.batches.loader import Loader
from cl.batches.plan import BatchPlan
from cl.config import Config, load_config, parse_config
from cl.corpus import Corpus, open_corpus
from cl.encoders import Inputs, ModelConfig, build_inputs
from cl.errors import ConfigError, DataError
from tests.unit.corpora import image_corpus

CLASSES = ["cat", "dog", None, "bird"]
SCORES = [0.25, 0.5, 1.0, 2.0]
COLUMNS: dict[str, pa.Array] = {
    "class": pa.array(CLASSES),
    "cluster": pa.array([3, 1, 4, 1], pa.int32()),
    "score": pa.array(SCORES, pa.float64()),
    "vector": pa.array([[1.0, n] for n in range(4)], pa.list_(pa.float32())),
    "taxon": pa.array([["animal", "cat"], ["animal", "dog"], ["animal", "fish"], ["animal", "bird"]]),
    "tags": pa.array([["a"], [], ["b", "a"], ["c"]]),
    "ragged": pa.array([["a"], ["a", "b"], ["a"], ["a"]]),
    "meta": pa.array(['{"colour": "red"}', '{"colour": "blue"}', "{}", '{"colour": "red"}']),
}


def write(root: Path, columns: dict[str, pa.Array] = COLUMNS, **options: Any) -> Corpus:
    """The corpus of `image_corpus` in which sample number n has the (n mod 4)-th value of each column."""
    corpus = image_corpus(root, **options)
    start = 0
    for fragment in corpus.fragments:
        url = corpus.fragment_url(fragment)
        table = storage.read_table(url)
        rows = pa.array([(start + row) % 4 for row in range(table.num_rows)])
        for name, values in columns.items():
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, values.take(rows))
        storage.write_table(url, table, fragment.row_groups[0])
        start += fragment.samples
    return open_corpus(str(root))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write(tmp_path_factory.mktemp("corpus"), broken=(5,))


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return build_inputs(load_config(ModelConfig, "models", "tiny-clip"), train=True)


class Section(Config):
    labels: dict[str, LabelConfig]


def configs(labels: dict[str, Any]) -> dict[str, LabelConfig]:
    return parse_config(Section, {"labels": labels}, "test").labels


def batches(corpus: Corpus, inputs: Inputs, labels: dict[str, Any], rank: int = 0, world: int = 1) -> list[Batch]:
    found = open_labels(configs(labels), [corpus])
    return list(Loader(BatchPlan([corpus], 0, 50), rank, world, inputs, steps=3, labels=found))


def by_number(corpus: Corpus, made: list[Batch], name: str) -> dict[int, Any]:
    """Sample number -> its label, of all samples in the batches, decodable or not."""
    numbers = {row["id"]: int(row["key"]) for row in corpus.read(["id", "key"]).to_pylist()}
    return {
        numbers[batch.ids[row].numpy().astype(">i8").tobytes().hex()]: batch.labels[name][row].tolist()
        for batch in made
        for row in batch.ids.any(1).nonzero().flatten().tolist()
    }


LABELS: dict[str, Any] = {
    "class": "class",
    "numbered": {"column": "taxon", "kind": "tags", "values": ["cat", "dog", "fish", "bird", "animal"]},
    "cluster": "cluster",
    "score": "score",
    "vector": "vector",
    "levels": "taxon",
    "tags": {"column": "tags", "kind": "tags", "values": ["a", "b", "c", "d"]},
    "source": "source",
    "colour": "meta.colour",
}


def test_kinds_and_shapes(corpus: Corpus, inputs: Inputs) -> None:
    made = batches(corpus, inputs, LABELS)
    shapes = {name: (tuple(label.shape), label.dtype) for name, label in made[0].labels.items()}
    assert shapes == {
        "class": ((50,), torch.int64),
        "numbered": ((50, 5), torch.float32),
        "cluster": ((50,), torch.int64),
        "score": ((50,), torch.float32),
        "vector": ((50, 2), torch.float32),
        "levels": ((50, 2), torch.int64),
        "tags": ((50, 4), torch.float32),
        "source": ((50,), torch.int64),
        "colour": ((50,), torch.int64),
    }
    values = {name: by_number(corpus, made, name) for name in LABELS}
    assert len(values["class"]) == 120
    for number in range(120):  # the broken sample 5 as well: it keeps its place and its labels
        kind = number % 4
        assert values["cluster"][number] == [3, 1, 4, 1][kind]
        assert values["score"][number] == SCORES[kind]
        assert values["vector"][number] == [1.0, kind]
        assert values["tags"][number] == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]][kind]
        assert values["numbered"][number] == [*(float(k == kind) for k in range(4)), 1.0]
        assert values["levels"][number] == [code_of("animal"), code_of(["cat", "dog", "fish", "bird"][kind])]
        assert values["source"][number] == code_of("test")
        if CLASSES[kind] is not None:
            assert values["class"][number] == code_of(str(CLASSES[kind]))
    unknown = [values["class"][number] for number in range(2, 120, 4)]
    assert all(code < 0 for code in unknown)
    assert len(set(unknown)) == len(unknown)  # nobody's class mates
    assert len({values["colour"][number] for number in range(120) if number % 4 in (0, 3)}) == 1
    padded = made[2]
    empty = padded.ids.any(1).logical_not()
    assert empty.sum() == 30
    assert all(not label[empty].any() for label in padded.labels.values())


def test_codes_are_the_strings_own() -> None:
    assert code_of("cat") == int.from_bytes(blake3(b"cat").digest()[:8], "little") % 2**63
    assert code_of("cat") == 6495522290459417320  # for ever: a resumed run must find its classes again
    assert len({code_of(str(n)) for n in range(10_000)}) == 10_000


@pytest.mark.parametrize("world", [2, 3])
def test_workers_share_the_labels_of_one_worker(corpus: Corpus, inputs: Inputs, world: int) -> None:
    whole = batches(corpus, inputs, LABELS)
    parts = [batches(corpus, inputs, LABELS, rank, world) for rank in range(world)]
    for step, batch in enumerate(whole):
        for name in LABELS:
            together = torch.cat([part[step].labels[name] for part in parts])
            assert torch.equal(together, batch.labels[name])
    moved = whole[0].to("cpu").rows(slice(2, 5))
    assert all(torch.equal(moved.labels[name], whole[0].labels[name][2:5]) for name in LABELS)


def test_values_number_the_classes(corpus: Corpus, inputs: Inputs) -> None:
    made = batches(corpus, inputs, {"cluster": {"column": "cluster", "values": [1, 3, 4]}})
    values = by_number(corpus, made, "cluster")
    assert [values[number] for number in range(4)] == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("clas", "labels.x names the column 'clas', which .* does not have; its columns are id, source"),
        ("meta.nothing", "no sample of .* has a value in 'meta.nothing'"),
        ({"column": "class", "kind": "number"}, "holds 'cat', which is no number"),
        ({"column": "tags", "kind": "tags"}, "field 'labels.x' .* kind: tags needs values"),
        ({"column": "score", "kind": "number", "values": [1]}, "values number classes or tags"),
        ({"column": "score", "kind": "class"}, "holds 0.25, which is no class"),
    ],
)
def test_labels_that_do_not_fit_are_refused(corpus: Corpus, label: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_labels(configs({"x": label}), [corpus])


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (
            {"column": "class", "values": ["cat", "dog"]},
            r"the label 'x' cannot be (None: every sample|'bird': it is none)",
        ),
        ("ragged", r"parquet: the label 'x' cannot be \['a', 'b'\]: expected a list of 1"),
        ({"column": "hole", "kind": "number"}, "the label 'x' cannot be None: every sample needs one"),
        ({"column": "tags", "kind": "tags", "values": ["a"]}, r"cannot be \['(b|c)'"),
    ],
)
def test_values_that_do_not_fit_are_one_clear_error(tmp_path: Path, inputs: Inputs, label: Any, words: str) -> None:
    corpus = write(tmp_path, COLUMNS | {"hole": pa.array([1.0, None, 2.0, 3.0])}, fragments=1)
    with pytest.raises(DataError, match=words):
        batches(corpus, inputs, {"x": label})


def test_corpora_must_agree(tmp_path: Path, corpus: Corpus) -> None:
    other = write(tmp_path, {"cluster": pa.array([0.5, 1.5, 2.5, 3.5])}, fragments=1)
    with pytest.raises(ConfigError, match=r"labels.x: column 'cluster' is number of one value in .*, but class of one"):
        open_labels(configs({"x": "cluster"}), [corpus, other])
