"""Tiny corpora for the tests of curation, made of real tars and parquet files in the format of `cl.corpus`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cl.corpus import Corpus, Fragment, content_hash, sample_id, sample_schema, text_pair_content
from pipelines.against import take_over
from pipelines.annotate import annotate, annotated_file, build_funnel
from pipelines.execute import reduce_partials
from pipelines.images import ImageInfo, probe
from pipelines.placement import Placement, WriteConfig
from pipelines.plan import Plan, build_plan, parse_stages, segments
from pipelines.rounds import here, run_rounds
from pipelines.run_steps import FragmentView, run_steps
from pipelines.stages.keyed import KeyedStage
from pipelines.write import tar_header


@dataclass
class Sample:
    """An image with its caption, before it has an address."""

    key: str
    text: str
    image: bytes
    extra: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None  # stated width and height where the bytes are broken


def picture(seed: int, width: int = 64, height: int = 64, form: str = "jpeg", quality: int = 90) -> bytes:
    """A smooth random picture: low frequencies only, so that re-encoding it hardly changes its perceptual hash."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    options = {"quality": quality} if form in ("jpeg", "webp") else {}
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, form, **options)
    return buffer.getvalue()


def image_corpus(root: Path, fragments: Sequence[Sequence[Sample]], source: str = "test") -> Corpus:
    """Write a raw image-text corpus, one tar a fragment, and return its manifest."""
    described = []
    for number, samples in enumerate(fragments):
        tar = root / "raw" / f"{number:05d}.tar"
        tar.parent.mkdir(parents=True, exist_ok=True)
        rows, position = [], 0
        with open(tar, "wb") as file:
            for sample in samples:
                found = probe(sample.image)
                width, height = sample.size or (found.width, found.height) if isinstance(found, ImageInfo) else (64, 64)
                form = found.format if isinstance(found, ImageInfo) else "jpeg"
                rows.append(
                    {
                        "id": sample_id(source, sample.key),
                        "source": source,
                        "key": sample.key,
                        "shard": str(tar),
                        "content": content_hash(sample.image),
                        "meta": None,
                        "offset": position + 512,
                        "length": len(sample.image),
                        "format": form,
                        "width": width,
                        "height": height,
                        "text": sample.text,
                        **sample.extra,
                    }
                )
                padding = -len(sample.image) % 512
                file.write(tar_header(f"{sample.key}.jpg", len(sample.image)) + sample.image + bytes(padding))
                position += 512 + len(sample.image) + padding
            file.write(bytes(1024))
        described.append(_fragment(root, number, rows, str(tar), "image-text"))
    return _commit(root, described, "image-text")


def text_corpus(root: Path, fragments: Sequence[Sequence[tuple[str, str]]], source: str = "test") -> Corpus:
    """Write a raw text-text corpus."""
    described = []
    for number, pairs in enumerate(fragments):
        rows = []
        for index, (anchor, positive) in enumerate(pairs):
            key = f"{number}-{index}"
            rows.append(
                {
                    "id": sample_id(source, key),
                    "source": source,
                    "key": key,
                    "shard": f"samples/{number:05d}.parquet",
                    "content": text_pair_content(anchor, positive),
                    "meta": None,
                    "anchor": anchor,
                    "positive": positive,
                    "negatives": None,
                }
            )
        described.append(_fragment(root, number, rows, f"samples/{number:05d}.parquet", "text-text"))
    return _commit(root, described, "text-text")


def _fragment(root: Path, number: int, rows: list[dict[str, Any]], shard: str, kind: Any) -> Fragment:
    fields = list(sample_schema(kind))
    known = {each.name for each in fields}
    if rows:
        extra = {name: value for name, value in rows[0].items() if name not in known}
        fields += [
            pa.field(name, pa.float64() if isinstance(value, float) else pa.int64()) for name, value in extra.items()
        ]
    path = root / "samples" / f"{number:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), path)
    return Fragment(path=f"samples/{number:05d}.parquet", samples=len(rows), shard=shard, row_groups=[len(rows)])


def _commit(root: Path, fragments: list[Fragment], kind: Any) -> Corpus:
    corpus = Corpus(kind=kind, samples=sum(each.samples for each in fragments), fragments=fragments, root=str(root))
    corpus.write(str(root))
    return corpus


def run_plan(
    corpus: Corpus,
    out: Path,
    stages: Sequence[Any],
    seed: int = 0,
    model: str | None = None,
    partitions: int | None = None,
) -> pa.Table:
    """Run stages in this process, without Ray, and return the annotated rows of all fragments in order."""
    complete = [*parse_stages(stages), Placement(settings=WriteConfig())]
    return run_built(build_plan(corpus, complete, str(out), seed, model, partitions))


def run_built(plan: Plan) -> pa.Table:
    """Run a plan in this process, without Ray, and return the annotated rows of all fragments in order."""
    take_over(plan)
    fragments = range(len(plan.corpus.fragments))
    opened: dict[int, Any] = {}
    for steps in segments(plan)[:-1]:
        done = steps[-1].action == "partial" and plan.reduced(steps[-1].node)
        for number in fragments:
            run_steps(plan, steps[:-1] if done else steps, number, opened)
        if steps[-1].node != plan.nodes[-1].number and not done:
            for number in range(len(fragments), plan.fragments_for(steps[-1].node)):
                run_steps(plan, steps[-1:], number, opened)
            reduce_here(plan, steps[-1].node)
    for number in fragments:
        annotate(plan, number)
    build_funnel(plan)  # raises if a sample was lost
    return pa.concat_tables(pq.read_table(annotated_file(plan, number)) for number in fragments)


def reduce_here(plan: Plan, node: int) -> None:
    """Reduce a global node in this process."""
    if isinstance(plan.nodes[node].stage, KeyedStage):
        run_rounds(plan, node, here(plan, node))
    else:
        reduce_partials(plan, node)


def column_of(plan: Plan, node: str, column: str) -> list[Any]:
    """A node's column over all fragments, vectors included."""
    number = next(each.number for each in plan.nodes if each.name == node)
    views = (FragmentView(plan, fragment) for fragment in range(len(plan.corpus.fragments)))
    return [value for view in views for value in view.made(number, column).to_pylist()]
