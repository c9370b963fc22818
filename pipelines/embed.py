"""`clew embed`: the embeddings of a corpus by a Clew checkpoint.

    OUT/00007.parquet    of fragment 7: id, and one column for each view (image_embedding, text_embedding ...), float16

One file a fragment, written when the fragment is done, so a run that was killed goes on where it stopped. Samples whose
image cannot be decoded are left out and counted; `OUT/broken/00007.json` names them.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field

from cl import storage
from cl.config import Config
from cl.corpus import VIEWS, open_corpus
from cl.errors import ConfigError
from cl.progress import progress
from cl.run import write_run_info
from pipelines.execute import fragments_through_ray, user_errors
from pipelines.paths import absolute
from pipelines.plan import Plan, build_plan
from pipelines.run_steps import FragmentView, output_table
from pipelines.stages.embedding import Embedding


class EmbedConfig(Config):
    """An embedding run."""

    corpus: str = Field(description="the corpus: a folder or URL")
    checkpoint: str = Field(description="Clew checkpoint, or a training run whose newest checkpoint is taken")
    out: str = Field(description="folder or URL of the embeddings")
    batch_size: int = Field(64, ge=1, description="rows of one forward pass")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the model")
    workers: int = Field(1, ge=1, description="actors, each with a copy of the model")
    threads: int = Field(1, ge=1, description="CPUs of an actor")
    gpus: float = Field(0.0, ge=0, description="GPUs of an actor")
    cpus: int | None = Field(None, ge=1, description="CPUs of a local Ray; None: all cores")


class EmbedResult(BaseModel):
    """What an embedding run did."""

    out: str
    samples: int  # embedded, those of earlier runs included
    quarantined: int
    dimensions: int
    fragments: int
    reused: int  # fragments that an earlier run had done


class _EmbedFragments:
    """Embeds fragments; one instance an actor."""

    def __init__(self, plan: Plan, out: str) -> None:
        self.plan, self.out = plan, out
        stage = plan.nodes[0].stage
        assert isinstance(stage, Embedding)
        self.encode = stage.open()

    def __call__(self, number: int) -> None:
        embed_fragment(self.plan, self.out, number, self.encode)


def embed_fragment(plan: Plan, out: str, number: int, encode: Any) -> None:
    """Write one fragment's embeddings: first what is broken, then the table that marks it as done."""
    rows = FragmentView(plan, number).rows(plan.nodes[0])
    table = output_table(plan.nodes[0], plan.made(0), rows, encode(rows))
    good = pc.is_null(table["broken"])
    bad = table.filter(pc.invert(good))
    if bad.num_rows:
        ids = rows.table["id"].take(bad["row"]).to_pylist()
        broken = dict(zip(ids, bad["broken"].to_pylist(), strict=True))
        storage.write_json(storage.join(out, "broken", f"{number:05d}.json"), broken)
    columns = {"id": rows.table["id"]} | {made.name: table[made.name] for made in plan.made(0)}
    storage.write_table(_file(out, number), pa.table(columns).filter(good))


def _file(out: str, number: int) -> str:
    return storage.join(out, f"{number:05d}.parquet")


def embed(cfg: EmbedConfig) -> EmbedResult:
    """Embed every sample of a corpus.

    Raises:
        ConfigError: OUT holds embeddings of another corpus or checkpoint, or lies inside the corpus.
        DataError: the corpus or the checkpoint cannot be used, or the disk is full.
    """
    corpus = open_corpus(absolute(cfg.corpus))
    out = absolute(cfg.out)
    if f"{out}/".startswith(f"{corpus.root}/"):
        raise ConfigError(f"out ({out}) must lie outside the corpus that is read ({corpus.root}).")
    stage = Embedding(
        model=absolute(cfg.checkpoint),
        batch_size=cfg.batch_size,
        precision=cfg.precision,
        workers=cfg.workers,
        threads=cfg.threads,
        gpus=cfg.gpus,
    )
    plan = build_plan(corpus, [stage], out, seed=0)
    _claim(out, plan.nodes[0].key)
    storage.sweep_temporary(out)
    sizes = [fragment.samples for fragment in corpus.fragments]
    there = set(storage.list_files(out, ".parquet"))
    missing = [number for number in range(len(sizes)) if f"{number:05d}.parquet" not in there]
    try:
        with write_run_info(out, "embed", cfg) as info:
            if missing:
                _run(cfg, plan, out, missing, sizes)
            broken = storage.list_files(storage.join(out, "broken"), ".json")
            quarantined = sum(len(storage.read_json(storage.join(out, "broken", name))) for name in broken)
            result = EmbedResult(
                out=out,
                samples=corpus.samples - quarantined,
                quarantined=quarantined,
                dimensions=plan.made(0)[0].type.list_size,
                fragments=len(sizes),
                reused=len(sizes) - len(missing),
            )
            info.add(**result.model_dump(exclude={"out"}), views=list(VIEWS[corpus.kind]))
    except KeyboardInterrupt:
        print(f"Interrupted. What was done is kept in {out}; the same command resumes it.", file=sys.stderr)
        raise
    return result


def _claim(out: str, key: str) -> None:
    """Refuse to mix embeddings of different corpora, models or settings in one folder."""
    marker = storage.join(out, ".embed.json")
    if storage.exists(marker):
        if storage.read_json(marker).get("key") != key:
            raise ConfigError(f"{out} holds embeddings of another corpus, checkpoint or setting; give another out.")
    elif storage.list_files(out, ".parquet") or storage.exists(storage.join(out, "corpus.json")):
        raise ConfigError(f"out ({out}) holds something that `clew embed` did not write; give another folder.")
    storage.write_json(marker, {"key": key})


def _run(cfg: EmbedConfig, plan: Plan, out: str, missing: list[int], sizes: list[int]) -> None:
    from cluster.session import ray_session

    total = sum(sizes[number] for number in missing)
    pool = (min(cfg.workers, len(missing)), float(cfg.threads), cfg.gpus)
    with ray_session(num_cpus=cfg.cpus), progress("Embedding", total=total, unit="samples") as bar, user_errors():
        for number in fragments_through_ray(missing, [(pool, _EmbedFragments, (plan, out))]):
            bar.advance(sizes[number])
