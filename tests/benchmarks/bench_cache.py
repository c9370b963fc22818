"""Gradient caching: time and memory beside plain micro-batches and the cached loss of sentence-transformers.

    python -m tests.benchmarks.bench_cache [--batch 4096] [--micro 64] [--repeats 3] [--threads 1] [--json result.json]

The same samples go through the same towers in the same micro-batches:

- pairs: a ViT and a text tower. `plain` is the forward and backward of each micro-batch without any contrastive loss,
  the least that training costs; `clew` is the InfoNCE of the whole batch through `cl.engine.cache`.
- texts: two texts a sample through the text tower. `plain` as above, one text a sample at a time;
  `clew` and `sentence-transformers` are the two `CachedMultipleNegativesRankingLoss`.

`encoding` is the same without a graph: 1 plus its ratio is the least time that caching can take. Every measurement is a
process of its own, after two micro-batches have warmed it up, and the contenders take turns. Time is CPU time, which
other programs disturb less than the clock. Memory is the peak of resident memory beyond weights, gradients and data, in
runs of their own in which the allocator returns at once what is freed: else it would be that of a fragmented heap. The
embeddings and their gradients are the only part of it that may grow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

VISION = {"image_size": 48, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4, "mlp_ratio": 4.0}
TEXT = {"vocab_size": 8192, "context_length": 24, "width": 128, "heads": 4, "layers": 4}
DIMENSIONS = 256
CONTENDERS = {
    "pairs": ["plain", "encoding", "clew"],
    "texts": ["plain", "encoding", "clew", "sentence-transformers"],
}
Step = Callable[[dict[str, Any]], None]


def status(field: str) -> float:
    """MiB of one field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def model_of_pairs() -> Any:
    from cl.config import parse_config
    from cl.encoders import ModelConfig, build_model

    fields = {
        "embed_dim": DIMENSIONS,
        "towers": {
            "image": {"family": "open_clip", "part": "vision", "config": VISION},
            "text": {"family": "open_clip", "part": "text", "config": TEXT},
        },
        "views": {"image": "image", "text": "text"},
    }
    return build_model(parse_config(ModelConfig, fields, "benchmark"), seed=0).train()


def chunks_of(batch: dict[str, Any], micro: int) -> list[dict[str, Any]]:
    rows = len(next(iter(batch.values())))
    return [{view: x[i : i + micro] for view, x in batch.items()} for i in range(0, rows, micro)]


def pairs(name: str, micro: int) -> tuple[Any, Step]:
    """The model and one step over {"image": [B, 3, 48, 48], "text": [B, 24]}."""
    import torch

    from cl.engine.cache import CachedBatch
    from cl.engine.collectives import Workers
    from cl.objectives import ObjectiveConfig, build_objective
    from cl.pairs import Pairs

    model, objective = model_of_pairs(), build_objective(ObjectiveConfig(name="infonce"))

    def plain(batch: dict[str, Any]) -> None:
        for chunk in chunks_of(batch, micro):
            views = model(chunk)
            (views["image"].square().sum() + views["text"].square().sum()).backward()

    def encode(chunk: dict[str, Any], skip: Collection[str]) -> Any:
        return model({view: x for view, x in chunk.items() if view not in skip})

    def encode_all(batch: dict[str, Any]) -> None:
        for chunk in chunks_of(batch, micro):
            model(chunk)

    def clew(batch: dict[str, Any]) -> None:
        groups = [(view,) for view in batch]
        cached = CachedBatch(encode, chunks_of(batch, micro), device=torch.device("cpu"), groups=groups)
        cached.evaluate(lambda views: objective(Pairs(views), Workers()), list(objective.parameters()))
        cached.backward()

    return model, {"plain": plain, "encoding": torch.no_grad()(encode_all), "clew": clew}[name]


def pairs_of_texts(name: str, micro: int) -> tuple[Any, Step]:
    """The model and one step over {"anchor": [B, 24], "positive": [B, 24]}."""
    import torch
    from sentence_transformers.sentence_transformer import losses as theirs
    from torch import nn

    from cl import losses as ours

    class Embedder(nn.Sequential):
        """What both losses take for a SentenceTransformer."""

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return {"sentence_embedding": self[0](features["input_ids"])}

    model = Embedder(model_of_pairs().towers["text"])

    def plain(batch: dict[str, Any]) -> None:
        for chunk in chunks_of(batch, micro):
            for ids in chunk.values():
                model({"input_ids": ids})["sentence_embedding"].square().sum().backward()

    def encode_all(batch: dict[str, Any]) -> None:
        for chunk in chunks_of(batch, micro):
            for ids in chunk.values():
                model({"input_ids": ids})

    if name in ("plain", "encoding"):
        return model, plain if name == "plain" else torch.no_grad()(encode_all)
    kind = {"clew": ours, "sentence-transformers": theirs}[name].CachedMultipleNegativesRankingLoss
    loss = kind(model, mini_batch_size=micro)
    return model, lambda batch: loss([{"input_ids": ids} for ids in batch.values()], None).backward()


def data(subject: str, rows: int) -> dict[str, Any]:
    """uint8 images, and token ids whose largest ends the text."""
    import torch

    def text() -> Any:
        ids = torch.randint(1, 8000, (rows, 24))
        ids[:, 0], ids[:, -1] = 8190, 8191
        return ids

    if subject == "texts":
        return {"anchor": text(), "positive": text()}
    return {"image": torch.randint(0, 256, (rows, 3, 48, 48), dtype=torch.uint8), "text": text()}


def measure(subject: str, name: str, batch: int, micro: int, threads: int) -> None:
    """Child process: print seconds and MiB of one step."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, step = {"pairs": pairs, "texts": pairs_of_texts}[subject](name, micro)
    inputs = data(subject, batch)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = status("VmRSS")
    step(data(subject, 2 * micro))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    wall, cpu = time.perf_counter(), time.process_time()
    step(inputs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"cpu_seconds": cpu, "seconds": wall, "mib": status("VmHWM") - before}))


def run(subject: str, name: str, options: argparse.Namespace, **environment: str) -> dict[str, float]:
    words = [sys.executable, __file__, "--child", subject, name]
    words += map(str, (options.batch, options.micro, options.threads))
    child = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return dict(json.loads(child.stdout.splitlines()[-1]))


def compare(subject: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the contenders in turns; ratios are to `plain`, memory without the embeddings and their gradients."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS[subject]}
    for _ in range(options.repeats):
        for name in found:
            found[name].append(run(subject, name, options))
    memory = {name: run(subject, name, options, MALLOC_MMAP_THRESHOLD_="262144")["mib"] for name in found}
    embeddings = 2 * 2 * options.batch * DIMENSIONS * 4 / 2**20  # two views, value and gradient, fp32
    lines: list[dict[str, Any]] = []
    for name, results in found.items():
        line: dict[str, Any] = {"subject": subject, "name": name, "batch": options.batch, "micro": options.micro}
        line |= {key: statistics.median(each[key] for each in results) for key in ("cpu_seconds", "seconds")}
        line["mib"] = memory[name]
        base = (lines or [line])[0]
        line["time_ratio"] = line["cpu_seconds"] / base["cpu_seconds"]
        line["memory_ratio"] = (line["mib"] - embeddings * (name not in ("plain", "encoding"))) / base["mib"]
        lines.append(line)
        print(
            f"{subject:<6} {name:<22} {line['cpu_seconds']:7.2f} CPU s {line['seconds']:7.2f} s {line['mib']:6.0f} MiB"
            f"   x{line['time_ratio']:.3f} time, x{line['memory_ratio']:.3f} memory without the embeddings",
            flush=True,
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--subjects", default="pairs,texts")
    parser.add_argument("--json")
    options = parser.parse_args()
    lines = [line for subject in options.subjects.split(",") for line in compare(subject, options)]
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        subject_, name_, batch_, micro_, threads_ = sys.argv[2:]
        measure(subject_, name_, int(batch_), int(micro_), int(threads_))
    else:
        main()
