"""Run folders for the tests of the report: written by hand to the layouts that the commands write, with real pictures.

The pictures are drawn here, so that their bytes, sizes and duplicates are known exactly.
"""

from __future__ import annotations

import io
import json
import math
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from cl import storage
from cl.corpus import QUARANTINE_SCHEMA, Corpus, Fragment, content_hash, sample_id, sample_schema

HOSTILE = "<script>alert('caption')</script> \u202e & \"quoted\" <img src=x onerror=alert(1)>"
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "orange", "purple", "black")


def draw(shape: str, colour: str, width: int = 64, height: int = 64, seed: int = 0) -> bytes:
    """A JPEG of one shape."""
    rng = random.Random(f"{shape}{colour}{seed}")
    image = Image.new("RGB", (width, height), (250, 248 - rng.randrange(20), 240))
    pen = ImageDraw.Draw(image)
    x, y, r = (
        width / 2 + rng.uniform(-6, 6),
        height / 2 + rng.uniform(-6, 6),
        min(width, height) * rng.uniform(0.2, 0.4),
    )
    corners = {"circle": 32, "square": 4, "triangle": 3, "star": 10}[shape]
    points = []
    for k in range(corners):
        length = r * (0.45 if shape == "star" and k % 2 else 1.0)
        angle = 2 * math.pi * k / corners - math.pi / 2
        points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    pen.polygon(points, fill=colour)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


def run_json(folder: Path, command: str, status: str = "finished", **fields: Any) -> None:
    """A `run.json` as `cl.run` writes it."""
    record = {
        "command": command,
        "status": status,
        "started": "2026-11-22T10:00:00+00:00",
        "finished": "2026-11-22T10:01:00+00:00" if status == "finished" else None,
        "seconds": 60.5 if status == "finished" else None,
        "seed": 7,
        "config_digest": "0123456789abcdef",
        "versions": {"python": "3.11.7", "clew": "0.1.0", "torch": "2.14.1", "ray": "2.60.0"},
        "cores": 2,
    }
    storage.write_json(str(folder / "run.json"), record | fields)


def image_rows(folder: Path, samples: int) -> list[dict[str, Any]]:
    """Write one tar of drawn pictures and return its rows; row 3 has a hostile caption, row 5 a broken picture."""
    rows: list[dict[str, Any]] = []
    path = folder / "heavy" / "drawn-00000.tar"
    path.parent.mkdir(parents=True)
    members = []
    for k in range(samples):
        shape, colour = SHAPES[k % len(SHAPES)], COLOURS[k // len(SHAPES) % len(COLOURS)]
        width, height = (200, 40) if k % 17 == 0 else (64, 48 + k % 24)
        data = draw(shape, colour, width, height, seed=k // 2)
        if k == 5:
            data = data[: len(data) // 3]
        text = HOSTILE if k == 3 else f"a {colour} {shape}" + " on plain paper" * (k % 3)
        members.append((f"{k:06d}.jpg", data))
        rows.append({"key": f"{k:06d}", "text": text, "width": width, "height": height, "content": content_hash(data)})
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        places = [(m.offset_data, m.size) for m in tar.getmembers()]
    for row, (offset, length) in zip(rows, places, strict=True):
        row |= {
            "id": sample_id("drawn", row["key"]),
            "source": "drawn",
            "shard": str(path),
            "offset": offset,
            "length": length,
            "format": "jpeg",
            "meta": "{}",
        }
    return rows


def ingest_run(folder: Path, samples: int = 96) -> Path:
    """An image-text corpus with a quarantine table."""
    rows = image_rows(folder, samples)
    table = pa.Table.from_pylist(rows, sample_schema("image-text"))
    storage.write_table(str(folder / "samples" / "00000.parquet"), table)
    bad = [
        {
            "shard": "drawn-00000.tar",
            "key": "broken",
            "stage": "ingest",
            "reason": "image_truncated",
            "detail": "ends early",
        },
        {
            "shard": "drawn-00000.tar",
            "key": "<b>mute</b>",
            "stage": "ingest",
            "reason": "caption_empty",
            "detail": None,
        },
    ]
    storage.write_table(str(folder / "quarantine" / "00000.parquet"), pa.Table.from_pylist(bad, QUARANTINE_SCHEMA))
    fragment = Fragment(path="samples/00000.parquet", samples=samples, shard=rows[0]["shard"], row_groups=[samples])
    Corpus(kind="image-text", samples=samples, quarantined=2, fragments=[fragment]).write(str(folder))
    (folder / "config.yaml").write_text(f"inputs: ['{rows[0]['shard']}']\nout: {folder}\n")
    run_json(folder, "ingest")
    return folder


def curate_run(folder: Path, corpus: Path) -> Path:
    """A curation of an ingested corpus: captions, shapes, near-duplicates, scores and clusters."""
    rows = pq.read_table(corpus / "samples" / "00000.parquet").to_pylist()
    seen: dict[str, str] = {}
    for k, row in enumerate(rows):
        rng = random.Random(k)
        row |= {
            "words": len(row["text"].split()),
            "language": rng.choice(["en"] * 8 + ["de", "fr"]),
            "score": rng.gauss(0.28, 0.05),
        }
        row |= {
            "cluster": k % 7,
            "near_duplicate_of": None,
            "near_duplicate_distance": None,
            "drop_stage": None,
            "drop_reason": None,
        }
        look = f"{row['text'].split(' on ')[0]}{k // 2}"
        if row["width"] > 3 * row["height"]:
            row |= {"drop_stage": "image_shape", "drop_reason": "aspect_too_large"}
        elif row["language"] != "en":
            row |= {"drop_stage": "language", "drop_reason": "language_not_wanted"}
        elif k % 11 == 1 and seen:
            row |= {
                "drop_stage": "near_duplicate",
                "drop_reason": "near_duplicate",
                "near_duplicate_of": list(seen.values())[-1],
                "near_duplicate_distance": 3,
            }
        elif row["score"] < 0.22:
            row |= {"drop_stage": "score", "drop_reason": "score_too_low"}
        else:
            seen[look] = row["id"]
    storage.write_table(str(folder / "annotated" / "00000.parquet"), pa.Table.from_pylist(rows))
    stages, came = [], len(rows)
    for stage in ("image_shape", "language", "near_duplicate", "score", "clusters"):
        reasons: dict[str, int] = {}
        for row in rows:
            if row["drop_stage"] == stage:
                reasons[row["drop_reason"]] = reasons.get(row["drop_reason"], 0) + 1
        stages.append({"stage": stage, "in": came, "dropped": reasons, "seconds": 1.5, "rows_per_second": came / 1.5})
        came -= sum(reasons.values())
    storage.write_json(str(folder / "funnel.json"), {"in": len(rows), "quarantined": 0, "kept": came, "stages": stages})
    fragment = Fragment(
        path="samples/00000.parquet", samples=came, shard="shards/00000.tar", row_groups=[came], lanes=[0]
    )
    Corpus(kind="image-text", samples=came, lanes=1, fragments=[fragment]).write(str(folder))
    (folder / "config.yaml").write_text(f"corpus: {corpus}\nout: {folder}\nseed: 7\nstages: []\n")
    run_json(folder, "curate")
    return folder


def train_run(folder: Path, corpus: Path, steps: int = 120, finished: bool = True) -> Path:
    """A training run; an unfinished one has a last line of metrics that was cut off and no summary."""
    rng = random.Random(1)
    lines = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "epoch": step // 40,
            "samples": step * 64,
            "loss": 1.2 + 3 * math.exp(-step / 40) + rng.gauss(0, 0.05),
            "logit_scale": 14.3 + step / 20,
            "lr": 1e-3 * min(step / 20, 1),
            "grad_norm": 1 + rng.random(),
            "samples_per_second": 130 + rng.gauss(0, 8),
            "data_wait": 0.01,
            "seconds": step / 2,
        }
        lines.append(json.dumps(record))
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (folder / "metrics.jsonl").write_text(text if finished else text + '{"step": 121, "lo')
    if finished:
        summary = {
            "steps": steps,
            "samples": steps * 64,
            "samples_per_second": 131.2,
            "loss_first": 4.16,
            "loss_last": 1.35,
            "seconds": 60.0,
            "checkpoint": f"{folder}/checkpoints/step-00000120",
            "workers": 2,
        }
        storage.write_json(str(folder / "summary.json"), summary)
    (folder / "config.yaml").write_text(
        f"out: {folder}\ncorpora:\n- path: {corpus}\nbatch_size: 64\nobjective: {{name: infonce}}\n"
    )
    run_json(folder, "train", "finished" if finished else "running")
    return folder


def eval_run(folder: Path, corpus: Path, checkpoint: Path) -> Path:
    """An evaluation with retrieval examples on an ingested corpus."""
    rows = pq.read_table(corpus / "samples" / "00000.parquet").to_pylist()
    examples = []
    for k in (2, 3, 8, 14):
        top = [rows[(k + 4 * j) % len(rows)]["id"] for j in range(5)]
        rank = 1 + k % 3
        top.remove(rows[k]["id"])
        top.insert(rank - 1, rows[k]["id"])
        examples.append({"query": rows[k]["text"], "query_id": rows[k]["id"], "rank": rank, "top": top})
    metrics = [
        {"metric": "retrieval/text_to_image/R@1", "value": 0.223, "chance": 1 / 96, "higher_is_better": True},
        {"metric": "retrieval/text_to_image/R@5", "value": 0.51, "chance": 5 / 96, "higher_is_better": True},
        {"metric": "retrieval/text_to_image/median_rank", "value": 5.0, "chance": 48.5, "higher_is_better": False},
        {"metric": "zero_shot/accuracy", "value": 0.41, "chance": 0.25, "higher_is_better": True},
        {"metric": "uniformity", "value": -2.113, "chance": None, "higher_is_better": False},
    ]
    result = {
        "checkpoint": f"{checkpoint}/checkpoints/step-00000120",
        "corpora": {"held out": {"samples": len(rows), "path": str(corpus), "metrics": metrics, "examples": examples}},
    }
    storage.write_json(str(folder / "eval.json"), result)
    (folder / "config.yaml").write_text(f"checkpoint: {checkpoint}\nout: {folder}\n")
    run_json(folder, "eval")
    return folder


def sweep_run(folder: Path) -> Path:
    """A sweep of two axes with one trial that failed."""
    trials: list[dict[str, Any]] = []
    for i, temperature in enumerate((0.02, 0.05, 0.1, 0.2)):
        for j, batch in enumerate((64, 128, 256)):
            value = None if (i, j) == (3, 0) else 0.25 - 0.04 * (i - 1) ** 2 + 0.03 * j
            parameters = {"objective.temperature": temperature, "batch_size": batch}
            status = "failed" if value is None else "stopped" if (i, j) == (0, 0) else "finished"
            scores = [{"samples": 100 * k, "step": k, "value": (value or 0) * k / 5} for k in range(1, 6)]
            trial = {"id": f"t{i}{j}", "parameters": parameters, "value": value, "status": status}
            trials.append(trial | {"seconds": 33.0, "steps": 100, "evaluations": scores})
    best = max((t for t in trials if t["value"]), key=lambda t: t["value"] or 0)
    result = {
        "metric": "retrieval/text_to_image/R@1",
        "mode": "max",
        "chance": 1 / 96,
        "best": best,
        "trials": trials,
        "axes": ["objective.temperature", "batch_size"],
    }
    storage.write_json(str(folder / "sweep.json"), result)
    run_json(folder, "sweep")
    return folder


def all_runs(root: Path) -> Path:
    """One run of every kind below `root`."""
    corpus = ingest_run(root / "corpus")
    curated = curate_run(root / "curated", corpus)
    trained = train_run(root / "trained", curated)
    eval_run(root / "evaluated", corpus, trained)
    sweep_run(root / "swept")
    return root
