"""From a list of stages to a graph of nodes with content-derived keys.

    plan = build_plan(corpus, stages, out, seed=0, model=None)

A node is one stage. Its key is a hash over the stage's name, version, fields and digest (of a model), the input corpus,
and the keys of the nodes it depends on: those that wrote the columns it reads, and the last node before it that could
drop rows (which depends on the one before, and so on). What a node computes for fragment 7 is the file
`OUT/.nodes/<key>/rows/00007.parquet`; a file that is there is right and is not computed again, so changing one stage
recomputes exactly what depends on it.

A node's file holds only the rows that were alive when the stage ran, in their order:

    row      int32, position in the fragment
    ...      the stage's columns
    drop     reason or null           } only of stages that may drop
    broken   what is wrong, or null   }
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from blake3 import blake3

from cl import storage
from cl.config import config_digest, parse_config
from cl.corpus import Corpus, sample_schema
from cl.errors import ConfigError, DataError
from pipelines.stages.base import GlobalStage, PixelStage, RowStage, Stage, require_kind
from pipelines.stages.keyed import KeyedStage
from pipelines.stages.registry import STAGES

PARTITION_ROWS = 50_000  # rows of the corpus that one partition of a keyed stage stands for ...
MAX_PARTITIONS = 1024  # ... up to this many partitions
RESERVED = ("row", "drop", "broken", "drop_stage", "drop_reason", "quarantined", "lane")
Action = Literal["run", "partial", "apply"]


@dataclass(frozen=True)
class Node:
    """One stage of a plan.

    Attributes:
        sources: column it reads -> number of the node that wrote it, None for a column of the corpus.
        made: the columns it writes.
        after: number of the last node before it that could drop rows, None if there is none.
        key: 32 hex digits, see the module's text.
    """

    number: int
    name: str
    stage: Stage
    sources: dict[str, int | None]
    after: int | None
    made: list[pa.Field]
    key: str


@dataclass(frozen=True)
class Step:
    """One action of one node on each fragment."""

    node: int
    action: Action


@dataclass(frozen=True)
class Plan:
    """Everything that a worker needs to compute any node of any fragment."""

    corpus: Corpus
    out: str
    seed: int
    nodes: list[Node]
    base: pa.Schema  # columns of the corpus
    columns: dict[str, int | None] = field(default_factory=dict)  # every column at the end -> the node that wrote it
    partitions: int = 1  # of keyed stages; no part of any key, as it changes no result
    frozen: Plan | None = None  # of the finished curation against which the rows are judged

    def digest(self) -> str:
        """A digest of everything that the plan computes."""
        return blake3("\0".join(node.key for node in self.nodes).encode()).hexdigest(length=16)

    def named(self, name: str) -> Node | None:
        """The node of a stage."""
        return next((node for node in self.nodes if node.name == name), None)

    def all_fragments(self) -> int:
        """The fragments of the corpus and, behind them, of all finished curations."""
        return len(self.corpus.fragments) + (self.frozen.all_fragments() if self.frozen else 0)

    def fragments_for(self, node: int) -> int:
        """How many fragments a node's rounds go over."""
        return self.all_fragments() if self.nodes[node].stage.frozen == "rows" else len(self.corpus.fragments)

    def home(self, fragment: int) -> tuple[Plan, int]:
        """The plan that a fragment belongs to, and its number there."""
        own = len(self.corpus.fragments)
        if fragment < own:
            return self, fragment
        assert self.frozen is not None
        return self.frozen.home(fragment - own)

    def beside(self) -> int:
        """Samples of the corpora of all finished curations."""
        return self.frozen.corpus.samples + self.frozen.beside() if self.frozen else 0

    def folder(self, node: int, kind: str) -> str:
        """Where a node keeps its files: kind is `rows`, `partial`, `reduced` or `shuffle-P`."""
        return storage.join(self.out, ".nodes", self.nodes[node].key, kind)

    def step_folder(self, step: Step) -> str:
        """The folder of a step's files, one a fragment; a keyed stage's partials say that its streams are there."""
        if step.action != "partial":
            return self.folder(step.node, "rows")
        if isinstance(self.nodes[step.node].stage, KeyedStage):
            return storage.join(self.folder(step.node, f"shuffle-{self.partitions}"), "partial")
        return self.folder(step.node, "partial")

    def file(self, step: Step, fragment: int) -> str:
        return storage.join(self.step_folder(step), f"{fragment:05d}.parquet")

    def reduced(self, node: int) -> bool:
        """Whether a global node's reduction is done."""
        return storage.exists(storage.join(self.folder(node, "reduced"), "done.json"))

    def made(self, node: int) -> list[pa.Field]:
        return self.nodes[node].made

    def last_drop(self) -> int | None:
        """The last node that could drop rows: its survivors are what the plan keeps."""
        return max((node.number for node in self.nodes if node.stage.drops), default=None)


def parse_stages(items: Any) -> list[Stage]:
    """Stages from YAML: each item a name, or a mapping of one name to its fields.

    Raises:
        ConfigError: an unknown name or field, a wrong type, a stage listed twice.
    """
    if not isinstance(items, (list, tuple)):
        raise ConfigError(f"stages must be a list such as [caption: {{min_words: 2}}], not {items!r:.80}.")
    stages: list[Stage] = []
    for number, item in enumerate(items):
        if isinstance(item, Stage):
            stages.append(item)
            continue
        where = f"stages.{number}"
        if isinstance(item, str):
            item = {item: None}
        if not isinstance(item, dict) or len(item) != 1:
            raise ConfigError(f"{where} must be one stage such as `caption: {{min_words: 2}}`, not {item!r:.80}.")
        name, fields = next(iter(item.items()))
        if fields is not None and not isinstance(fields, dict):
            raise ConfigError(f"{where}.{name} must be a mapping of the stage's fields, not {fields!r:.80}.")
        stages.append(named(parse_config(STAGES[str(name)], fields or {}, f"{where}.{name}"), str(name)))
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Stage {name!r} is listed twice; its columns and reasons could not be told apart.")
    return stages


def named(stage: Stage, name: str) -> Stage:
    """The stage with the name under which it is registered."""
    if type(stage).name != name:
        type(stage).name = name
    return stage


def dump_stages(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The inverse of `parse_stages`, with every field."""
    return [{stage.name: stage.model_dump(mode="json")} for stage in stages]


def build_plan(
    corpus: Corpus,
    stages: Sequence[Stage],
    out: str,
    seed: int,
    model: str | None = None,
    partitions: int | None = None,
    frozen: Plan | None = None,
) -> Plan:
    """Check that the stages fit together and the corpus, and key them.

    Args:
        partitions: of keyed stages; None: one for `PARTITION_ROWS` samples.
        frozen: the plan of a finished curation against which the rows are judged.

    Raises:
        ConfigError: a stage that does not work on this kind of corpus, reads a column that nothing wrote before it,
            writes a reserved or already written column, or lacks its model.
        DataError: the corpus lacks a column of its format.
    """
    kind = corpus.kind
    base = base_schema(corpus)
    complete: list[Stage] = []
    for stage in stages:
        require_kind(stage, kind)
        present = {type(each) for each in complete} | {type(each) for each in stages}
        complete += [each for each in stage.before(kind) if type(each) not in present]
        complete.append(stage)
    origin = corpus_digest(corpus)
    columns: dict[str, int | None] = dict.fromkeys(base.names)
    nodes: list[Node] = []
    after: int | None = None
    for number, unresolved in enumerate(complete):
        stage = unresolved.resolve(model, kind)
        sources = _sources(stage, stage.needs(kind), columns, complete, kind)
        fields = stage.model_dump(mode="json", exclude=set(stage.unkeyed))
        parts = [config_digest({"name": stage.name, "version": stage.version, "fields": fields})]
        parts += [stage.digest(), str(seed) if stage.seeded else "", origin]
        parts += [f"{column}={nodes[source].key}" for column, source in sorted(sources.items()) if source is not None]
        parts.append("" if after is None else nodes[after].key)
        if frozen is not None and isinstance(stage, (GlobalStage, KeyedStage)) and stage.frozen != "anew":
            parts.append(frozen.digest())
        key = blake3("\0".join(parts).encode()).hexdigest(length=16)
        makes = stage.makes(kind)
        nodes.append(Node(number, stage.name, stage, sources, after, makes, key))
        for made in makes:
            if made.name in RESERVED:
                raise ConfigError(f"Stage {stage.name!r} writes column {made.name!r}, a name that Clew itself uses.")
            writer = columns.get(made.name)
            if writer is not None:
                other = nodes[writer].name
                raise ConfigError(f"Stages {other!r} and {stage.name!r} both write column {made.name!r}.")
            if made.name in sample_schema(kind).names:
                raise ConfigError(f"Stage {stage.name!r} writes column {made.name!r}, which belongs to every corpus.")
            columns[made.name] = number
        if stage.drops:
            after = number
    samples = corpus.samples + (frozen.corpus.samples + frozen.beside() if frozen else 0)
    partitions = partitions or min(-(-samples // PARTITION_ROWS), MAX_PARTITIONS)
    return Plan(corpus, out, seed, nodes, base, columns, max(partitions, 1), frozen)


def _sources(
    stage: Stage, needs: Sequence[str], columns: dict[str, int | None], stages: Sequence[Stage], kind: Any
) -> dict[str, int | None]:
    for column in needs:
        if column not in columns:
            later = [each.name for each in stages if column in {made.name for made in each.makes(kind)}]
            hint = f"stage {later[0]!r} writes it and must come earlier" if later else f"there are {', '.join(columns)}"
            raise ConfigError(f"Stage {stage.name!r} needs column {column!r}, but nothing has written it: {hint}.")
    return {column: columns[column] for column in needs}


def base_schema(corpus: Corpus) -> pa.Schema:
    """The columns of a corpus, from its first fragment.

    Raises:
        DataError: a column of the format is missing or has another type.
    """
    url = corpus.fragment_url(corpus.fragments[0])
    with storage.open_parquet(url) as file:
        schema = file.schema_arrow
    for wanted in sample_schema(corpus.kind):
        if wanted.name not in schema.names:
            raise DataError(f"{url} has no column {wanted.name!r}, which a corpus of kind {corpus.kind} must have.")
        found = schema.field(wanted.name).type
        if found != wanted.type:
            raise DataError(f"{url}: column {wanted.name!r} is of type {found}, but must be {wanted.type}.")
    return schema.remove_metadata()


def corpus_digest(corpus: Corpus) -> str:
    """A digest of the light plane: sizes and parquet footers (row counts, sizes and extremes of all columns)."""

    def footer(url: str) -> bytes:
        fs, path = storage.open_fs(url)
        try:
            size = int(fs.size(path))
            tail = fs.cat_file(path, start=max(size - 8, 0), end=size)
            length = int.from_bytes(tail[:4], "little") + 8
            return size.to_bytes(8, "little") + bytes(fs.cat_file(path, start=max(size - length, 0), end=size))
        except FileNotFoundError as error:
            raise DataError(f"{url} does not exist, but the corpus lists it.") from error

    digest = blake3(f"{corpus.kind}\0{corpus.root if _relative(corpus) else ''}".encode())
    with ThreadPoolExecutor(8) as pool:
        for part in pool.map(footer, [corpus.fragment_url(fragment) for fragment in corpus.fragments]):
            digest.update(part)
    return digest.hexdigest(length=16)


def _relative(corpus: Corpus) -> bool:
    """Whether shards are addressed from the corpus's root, so that another root means other bytes."""
    return corpus.kind == "image-text" and any(
        "://" not in fragment.shard and not fragment.shard.startswith("/") for fragment in corpus.fragments
    )


def segments(plan: Plan) -> list[list[Step]]:
    """The steps between global reductions: each list is one pass over the fragments.

    A segment that ends with a `partial` is followed by that node's reduction.
    """
    out: list[list[Step]] = [[]]
    for node in plan.nodes:
        if isinstance(node.stage, (GlobalStage, KeyedStage)):
            out[-1].append(Step(node.number, "partial"))
            out.append([Step(node.number, "apply")])
        else:
            out[-1].append(Step(node.number, "run"))
    return [segment for segment in out if segment]


def pools(plan: Plan, steps: Sequence[Step]) -> list[tuple[tuple[int, float, float], list[Step]]]:
    """Consecutive steps grouped by where they run: (actors, CPUs, GPUs), actors 0 for tasks; a model runs alone."""

    def pool(step: Step) -> tuple[int, int, float, float]:
        stage = plan.nodes[step.node].stage
        if step.action == "run" and isinstance(stage, RowStage) and stage.pool()[0]:
            return (step.node, *stage.pool())
        return (-1, 0, 1.0, 0.0)

    return [(key[1:], list(group)) for key, group in itertools.groupby(steps, key=pool)]


def is_pixel(plan: Plan, step: Step) -> bool:
    return step.action == "run" and isinstance(plan.nodes[step.node].stage, PixelStage)
