"""k-means out of core beside faiss and scikit-learn in memory: time, inertia and peak memory.

    python -m tests.benchmarks.bench_clusters [--rows 100000 300000 1000000] [--dim 256] [--clusters 1000]
                                              [--full 2] [--peers faiss sklearn] [--out result.json]

The points are of length 1, drawn around three times as many random centres as there are clusters to find. Every
contender runs in a process of its own, one thread, in turns; the corpus lies in fragments of 50,000 rows. `clew` is the
stage's rounds in one process (sample of 256 rows a cluster, then `--full` rounds over the corpus), faiss is trained on
all points (its own default is the same sample), scikit-learn is MiniBatchKMeans. Inertia is the sum of 1 - cosine over
all rows. Memory is the peak of the process beyond what it took before it saw the data.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cl import storage
from cl.corpus import Corpus, Fragment, open_corpus, sample_schema
from pipelines.kmeans import assign, faiss_threads, unit
from pipelines.plan import build_plan, parse_stages, segments
from pipelines.rounds import here, run_rounds
from pipelines.run_steps import run_steps
from pipelines.stages.base import vector_array, vectors
from pipelines.streams import read_result

FRAGMENT = 50_000
ITERATIONS = 20
SPREAD = 0x9E3779B97F4A7C15F39CC0605CEDC835  # odd: ids that are all different, in no order


def make_corpus(root: Path, rows: int, dim: int, clusters: int) -> None:
    """A text corpus whose column `anchor_embedding` holds the points."""
    rng = np.random.default_rng(0)
    middle = unit(rng.normal(size=(3 * clusters, dim)))
    fragments = []
    for number, start in enumerate(range(0, rows, FRAGMENT)):
        count = min(FRAGMENT, rows - start)
        points = unit(middle[rng.integers(len(middle), size=count)] + rng.normal(size=(count, dim)) * dim**-0.5)
        same = {each.name: None if each.nullable else "" for each in sample_schema("text-text")}
        plain: dict[str, Any] = {name: [value] * count for name, value in same.items()}
        plain["id"] = [f"{row * SPREAD % (1 << 128):032x}" for row in range(start, start + count)]
        path = f"samples/{number:05d}.parquet"
        table = pa.table(plain, schema=sample_schema("text-text"))
        storage.write_table(str(root / path), table.append_column("anchor_embedding", vector_array(points)))
        fragments.append(Fragment(path=path, samples=count, shard=path, row_groups=[count]))
    Corpus(kind="text-text", samples=rows, fragments=fragments).write(str(root))


def read_points(corpus: Corpus) -> np.ndarray:
    """float32 [n, D]."""
    parts = [
        vectors(storage.read_table(corpus.fragment_url(each), ["anchor_embedding"])["anchor_embedding"])
        for each in corpus.fragments
    ]
    return np.concatenate(parts)


def centroids_of(name: str, corpus: Corpus, clusters: int, full: int, out: str) -> np.ndarray:
    """float32 [K, D] by one contender."""
    if name == "clew":
        stage = {"clusters": {"count": clusters, "iterations": ITERATIONS, "full": full}}
        plan = build_plan(corpus, parse_stages([stage]), out, 0)
        for number in range(len(corpus.fragments)):
            run_steps(plan, segments(plan)[0], number, {})
        run_rounds(plan, 0, here(plan, 0))
        return vectors(read_result(plan, 0, 0, plan.partitions).sort_by("cluster")["centroid"])
    points = read_points(corpus)
    if name == "faiss":
        import faiss

        kmeans = faiss.Kmeans(
            points.shape[1], clusters, niter=ITERATIONS, spherical=True, max_points_per_centroid=len(points)
        )
        kmeans.train(points)
        return np.asarray(kmeans.centroids)
    from sklearn.cluster import MiniBatchKMeans

    return unit(MiniBatchKMeans(clusters, n_init=1, random_state=0).fit(points).cluster_centers_).astype(np.float32)


def peak_kib() -> int:
    """The largest resident memory of this process so far (ru_maxrss would count its parent's)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def contend(name: str, root: str, clusters: int, full: int) -> dict[str, float]:
    """One contender's result, in this process."""
    import faiss  # noqa: F401

    corpus = open_corpus(root)
    before = peak_kib()
    with tempfile.TemporaryDirectory() as out, faiss_threads(1):
        start = time.perf_counter()
        centroids = centroids_of(name, corpus, clusters, full, out)
        seconds = time.perf_counter() - start
        peak = (peak_kib() - before) / 1024
        inertia = 0.0
        for fragment in corpus.fragments:
            column = storage.read_table(corpus.fragment_url(fragment), ["anchor_embedding"])["anchor_embedding"]
            inertia += float(assign(vectors(column), centroids)[1].sum(dtype=np.float64))
    return {"seconds": round(seconds, 1), "inertia": round(inertia, 1), "peak_mib": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--full", type=int, default=2)
    parser.add_argument("--peers", nargs="*", default=["faiss", "sklearn"])
    parser.add_argument("--out")
    parser.add_argument("--contend", nargs=2, help=argparse.SUPPRESS)  # NAME CORPUS: one contender's own process
    args = parser.parse_args()
    if args.contend:
        name, root = args.contend
        print(json.dumps(contend(name, root, args.clusters, args.full)))
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    print(f"{'rows':>10} {'':8} {'seconds':>8} {'inertia':>12} {'of faiss':>9} {'MiB':>7}")
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as root:
            make_corpus(Path(root), rows, args.dim, args.clusters)
            found = results[str(rows)] = {}
            for name in ["clew", *args.peers]:
                command = [sys.executable, "-m", "tests.benchmarks.bench_clusters", "--contend", name, root]
                command += ["--clusters", str(args.clusters), "--full", str(args.full)]
                run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found[name] = json.loads(run.stdout.splitlines()[-1])
        for name, row in found.items():
            share = row["inertia"] / found["faiss"]["inertia"] if "faiss" in found else float("nan")
            print(f"{rows:>10} {name:8} {row['seconds']:>8} {row['inertia']:>12} {share:>9.4f} {row['peak_mib']:>7}")
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
