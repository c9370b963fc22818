"""Time and memory of the contrastive loss, forward and backward, beside open_clip and the plain formula.

    python tests/benchmarks/bench_loss.py [--sizes 1024,4096,16384] [--dims 512] [--dtypes fp32] [--repeats 3]
                                          [--workers 1,2] [--threads 2] [--json result.json]

Every measurement is a process of its own: inputs and a small warm-up first, then peak resident memory beyond that
point and the median time of the repeats. The contenders take turns. One whose predicted peak is over 12 GiB is not run
and stands in the table as "does not fit". With two workers (gloo, one thread each) the batch is divided between them
and the slower worker counts.
"""

from __future__ import annotations

import argparse
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
# Peak bytes for each of the N x N entries, from measurement; Clew keeps none.
BYTES_PER_ENTRY = {"clew": 0, "open_clip": 17, "formula": 21, "clew siglip": 0, "open_clip siglip": 21}


def contender(name: str, rank: int, world: int) -> Callable[..., Any]:
    """loss(image, text, scale, bias) by one of the ways."""
    if name == "clew":
        from cl.losses import ClipLoss

        clip = ClipLoss(rank=rank, world_size=world)
        return lambda image, text, scale, bias: clip(image, text, scale)
    if name == "clew siglip":
        from cl.losses import SigLipLoss

        return SigLipLoss(rank=rank, world_size=world)
    import open_clip.loss as theirs

    if name == "open_clip":
        exact = theirs.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        return lambda image, text, scale, bias: exact(image, text, scale)
    if name == "open_clip siglip":
        return theirs.SigLipLoss(rank=rank, world_size=world)
    from torch import arange
    from torch.nn.functional import cross_entropy

    def formula(image: Any, text: Any, scale: Any, bias: Any) -> Any:
        logits = scale * image @ text.T
        own = arange(len(image))
        return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2

    return formula


def status(field: str) -> float:
    """MiB of one field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def measure(name: str, rows: int, dim: int, dtype: str, rank: int, world: int, store: str, threads: int) -> None:
    """Child process: print the peak and the seconds of one forward and backward."""
    import torch
    from torch.nn.functional import normalize

    torch.set_num_threads(threads)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    loss = contender(name, rank, world)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def inputs(count: int) -> list[Any]:
        torch.manual_seed(rank)
        views = [normalize(torch.randn(count // world, dim), dim=1).to(kind).requires_grad_() for _ in range(2)]
        return [*views, torch.tensor(14.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)]

    loss(*inputs(128 * world)).backward()
    leaves = inputs(rows)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = status("VmRSS")
    start = time.perf_counter()
    value = loss(*leaves)
    value.backward()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "mib": status("VmHWM") - before, "loss": float(value.detach())}))
    if world > 1:
        torch.distributed.destroy_process_group()


def run(name: str, rows: int, dim: int, dtype: str, world: int, threads: int) -> dict[str, float]:
    """One measurement: the slowest worker's time and the largest worker's memory."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--child", name, str(rows), str(dim), dtype]
        tail = [str(world), f"{folder}/store", str(max(1, threads // world))]
        children = [
            subprocess.Popen([*words, str(rank), *tail], stdout=subprocess.PIPE, text=True) for rank in range(world)
        ]
        results = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    return {key: max(result[key] for result in results) for key in ("seconds", "mib", "loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024,4096,16384")
    parser.add_argument("--dims", default="512")
    parser.add_argument("--dtypes", default="fp32")
    parser.add_argument("--workers", default="1")
    parser.add_argument("--names", default=",".join(BYTES_PER_ENTRY))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    rows_of_table: list[dict[str, Any]] = []
    for world in map(int, options.workers.split(",")):
        for dtype in options.dtypes.split(","):
            for dim in map(int, options.dims.split(",")):
                for rows in map(int, options.sizes.split(",")):
                    rows_of_table += compare(options, world, dtype, dim, rows)
    if options.json:
        Path(options.json).write_text(json.dumps(rows_of_table, indent=2))


def compare(options: argparse.Namespace, world: int, dtype: str, dim: int, rows: int) -> list[dict[str, Any]]:
    """Measure all contenders in turns and print one line each, with ratios to open_clip's softmax loss."""
    names = options.names.split(",")
    fitting = [name for name in names if BYTES_PER_ENTRY[name] * rows**2 / world < LIMIT_GIB * 2**30]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in fitting}
    for _ in range(options.repeats):
        for name in fitting:
            found[name].append(run(name, rows, dim, dtype, world, options.threads))
    lines = []
    for name in names:
        line: dict[str, Any] = {"workers": world, "dtype": dtype, "dim": dim, "batch": rows, "name": name}
        if name in fitting:
            line["seconds"] = statistics.median(each["seconds"] for each in found[name])
            line["mib"] = statistics.median(each["mib"] for each in found[name])
        lines.append(line)
    base = next((line for line in lines if line["name"] == "open_clip"), {})
    for line in lines:
        text = f"{world} worker(s) {dtype} D={dim} N={rows:>6} {line['name']:<17}"
        if "seconds" not in line:
            print(f"{text} does not fit", flush=True)
            continue
        text += f" {line['seconds']:8.3f} s {line['mib']:8.0f} MiB"
        if "seconds" in base and line is not base:
            line["time_ratio"], line["memory_ratio"] = line["seconds"] / base["seconds"], line["mib"] / base["mib"]
            text += f"   x{line['time_ratio']:.2f} time, x{line['memory_ratio']:.3f} memory"
        print(text, flush=True)
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name_, rows_, dim_, dtype_, rank_, world_, store_, threads_ = sys.argv[2:]
        measure(name_, int(rows_), int(dim_), dtype_, int(rank_), int(world_), store_, int(threads_))
    else:
        main()
