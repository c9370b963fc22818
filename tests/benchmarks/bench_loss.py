"""Time and memory of the contrastive losses, forward and backward, beside what a user would pick instead.

    python tests/benchmarks/bench_loss.py            # the rows of the README's table, about twenty minutes
    python tests/benchmarks/bench_loss.py --quick    # two small batches, a few minutes
    python tests/benchmarks/bench_loss.py --full     # 1,024 to 65,536 samples, D = 512 and 1,024, 1 and 2 workers
    ... [--sizes 4096,16384 --dims 512 --workers 1,2] [--dtypes fp32,bf16] [--names clew,open_clip] [--repeats 3]
        [--threads 2] [--json result.json]

Every measurement is a process of its own: inputs and a small warm-up first, then peak resident memory beyond that
point and the time of one forward and backward. Contenders and types take turns; figures are medians over the turns,
and ratios are what to look at. One whose predicted peak on this machine is over 12 GiB is not run and stands in the
table as "does not fit". With two workers (gloo, threads divided between them) the batch is divided too and the slower
worker counts.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_GIB = 12
CHUNK = 1024  # rows of scores at a time, where a loss offers that
SCALE, BIAS = 14.3, -10.0

# Name -> peak numbers for each of the N x N entries, from measurement (None: no matrix is kept), and the original that
# it is an alternative to.
CONTENDERS: dict[str, tuple[float | None, str]] = {
    "clew": (None, "open_clip"),
    "open_clip": (4.25, "open_clip"),
    "formula": (4.25, "open_clip"),
    "sentence-transformers": (None, "open_clip"),
    "clew siglip": (None, "open_clip siglip"),
    "open_clip siglip": (5.25, "open_clip siglip"),
    "open_clip siglip chunked": (1.5, "open_clip siglip"),
}
Setting = tuple[int, int, int]  # workers, dimensions, samples
TABLE: list[Setting] = [(1, 512, 4096), (1, 512, 16384), (1, 1024, 8192), (2, 512, 8192), (1, 512, 65536)]
QUICK: list[Setting] = [(1, 512, 1024), (1, 512, 4096)]
FULL: list[Setting] = list(itertools.product([1, 2], [512, 1024], [1024, 2048, 4096, 8192, 16384, 32768, 65536]))


def contender(name: str, rank: int, world: int) -> Callable[..., Any] | None:
    """loss(image, text, scale, bias) by one of the ways, after which `backward` gives all gradients.

    None where the installed version does not offer it.
    """
    if name == "clew":
        from cl.losses import ClipLoss

        clip = ClipLoss(rank=rank, world_size=world)
        return lambda image, text, scale, bias: clip(image, text, scale)
    if name == "clew siglip":
        from cl.losses import SigLipLoss

        return SigLipLoss(rank=rank, world_size=world)
    if name == "formula":
        return formula if world == 1 else None
    if name == "sentence-transformers":
        return ranking_loss(world)
    import open_clip.loss as theirs

    if name == "open_clip":
        exact = theirs.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        return lambda image, text, scale, bias: exact(image, text, scale)
    if name == "open_clip siglip":
        return theirs.SigLipLoss(rank=rank, world_size=world)
    if "chunk_size" not in inspect.signature(theirs.SigLipLoss).parameters:
        return None
    return theirs.SigLipLoss(rank=rank, world_size=world, chunk_size=CHUNK)


def formula(image: Any, text: Any, scale: Any, bias: Any) -> Any:
    """CLIP's loss as it stands in the paper, on one matrix."""
    from torch import arange
    from torch.nn.functional import cross_entropy

    logits = scale * image @ text.T
    own = arange(len(image))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def ranking_loss(world: int) -> Callable[..., Any]:
    """The cached loss of sentence-transformers in both directions, on embeddings that are there already."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score
    from torch import nn

    no_model: Any = nn.Sequential(nn.Identity())
    loss = CachedMultipleNegativesRankingLoss(
        no_model,
        scale=SCALE,
        similarity_fct=dot_score,
        mini_batch_size=CHUNK,
        gather_across_devices=world > 1,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    # It goes backward chunk by chunk as it goes forward; what it returns has no gradient of its own any more.
    return lambda image, text, scale, bias: loss.calculate_loss([[image], [text]], with_backward=True)


def status(field: str) -> float:
    """MiB of one field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def measure(name: str, rows: int, dim: int, dtype: str, rank: int, world: int, store: str, threads: int) -> None:
    """Child process: print the peak and the seconds of one forward and backward, or nothing where it is not offered."""
    import torch
    from torch.nn.functional import normalize

    torch.set_num_threads(threads)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    loss = contender(name, rank, world)
    if loss is None:
        return
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def inputs(count: int) -> list[Any]:
        torch.manual_seed(rank)
        views = [normalize(torch.randn(count // world, dim), dim=1).to(kind).requires_grad_() for _ in range(2)]
        return [*views, torch.tensor(SCALE, requires_grad=True), torch.tensor(BIAS, requires_grad=True)]

    def step(leaves: list[Any]) -> float:
        value = loss(*leaves)
        if value.requires_grad:
            value.backward()
        return float(value.detach())

    step(inputs(128 * world))
    leaves = inputs(rows)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = status("VmRSS")
    start = time.perf_counter()
    value = step(leaves)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "mib": status("VmHWM") - before, "loss": value}))
    if world > 1:
        torch.distributed.destroy_process_group()


def run(name: str, rows: int, dim: int, dtype: str, world: int, threads: int) -> dict[str, float] | None:
    """One measurement: the slowest worker's time and the largest worker's memory."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-W", "ignore", __file__, "--child", name, str(rows), str(dim), dtype]
        tail = [str(world), f"{folder}/store", str(max(1, threads // world))]
        children = [
            subprocess.Popen([*words, str(rank), *tail], stdout=subprocess.PIPE, text=True) for rank in range(world)
        ]
        outputs = [child.communicate()[0].splitlines() for child in children]
        if any(child.returncode for child in children):
            raise SystemExit(f"{name} failed at {rows} x {dim} {dtype} on {world} worker(s); see above.")
    if not all(outputs):
        return None
    results = [json.loads(lines[-1]) for lines in outputs]
    return {key: max(result[key] for result in results) for key in ("seconds", "mib", "loss")}


def fits(name: str, dtype: str, rows: int) -> bool:
    """Whether the predicted peak of all workers together is below the limit."""
    numbers = CONTENDERS[name][0] or 0
    return numbers * {"fp32": 4, "bf16": 2}[dtype] * rows**2 < LIMIT_GIB * 2**30


def compare(options: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """Measure all contenders in turns; print one line each, with ratios to ClipLoss in fp32 and to its original."""
    world, dim, rows = setting
    pairs = list(itertools.product(options.names.split(","), options.dtypes.split(",")))
    found: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in pairs}
    missing: set[tuple[str, str]] = set()
    for _ in range(options.repeats if rows <= 16384 else 1):
        for name, dtype in pairs:
            if fits(name, dtype, rows) and (name, dtype) not in missing:
                result = run(name, rows, dim, dtype, world, options.threads)
                if result is None:
                    missing.add((name, dtype))
                else:
                    found[name, dtype].append(result)
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for name, dtype in pairs:
        if (name, dtype) in missing:
            continue
        lines[name, dtype] = {"workers": world, "dim": dim, "batch": rows, "name": name, "dtype": dtype}
        for key in ("seconds", "mib", "loss"):
            if found[name, dtype]:
                lines[name, dtype][key] = statistics.median(result[key] for result in found[name, dtype])
    print(f"\n{rows:,} x {dim}, {world} worker(s)   {'':24} to ClipLoss fp32    to the original in its type")
    for (name, dtype), line in lines.items():
        if "seconds" not in line:
            print(f"  {name:<25} {dtype}   does not fit", flush=True)
            continue
        text = f"  {name:<25} {dtype} {line['seconds']:9.3f} s {line['mib']:7.0f} MiB"
        for base, of in (("clip", ("open_clip", "fp32")), ("original", (CONTENDERS[name][1], dtype))):
            if "seconds" in lines.get(of, {}):
                line[f"time_to_{base}"] = line["seconds"] / lines[of]["seconds"]
                line[f"memory_to_{base}"] = line["mib"] / lines[of]["mib"]
                text += f"   x{line[f'time_to_{base}']:.2f} time x{line[f'memory_to_{base}']:.3f} memory"
        print(text, flush=True)
    return list(lines.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--sizes")
    parser.add_argument("--dims", default="512")
    parser.add_argument("--workers", default="1")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--names", default=",".join(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    settings = QUICK if options.quick else FULL if options.full else TABLE
    if options.sizes:
        workers, dims, sizes = (map(int, each.split(",")) for each in (options.workers, options.dims, options.sizes))
        settings = list(itertools.product(workers, dims, sizes))
    lines = [line for setting in settings for line in compare(options, setting)]
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name_, rows_, dim_, dtype_, rank_, world_, store_, threads_ = sys.argv[2:]
        measure(name_, int(rows_), int(dim_), dtype_, int(rank_), int(world_), store_, int(threads_))
    else:
        main()
