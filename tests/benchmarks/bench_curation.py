"""Curation of texts, Clew beside what a user would pick instead: rows a second, and how right each is.

    python -m tests.benchmarks.bench_curation duplicates [--texts FILE.parquet --column text] [--documents 100000]
                                                         [--text-dedup PYTHON] [--repeats 3] [--out result.json]
    python -m tests.benchmarks.bench_curation texts [--texts FILE.parquet --column text] [--documents 100000] ...

**texts**: rows a second of the stages that judge texts, in one process, beside a loop over the rows that computes the
same with `re`, `unicodedata`, `collections` and ftfy, as tools that map a function over samples do. Without `--texts`
the captions that ship with Clew, over and over.

**duplicates**: near-duplicate removal. Every contender gets the same texts, lower-cased runs of letters and digits,
shingles of three words, and decides which texts to keep at a Jaccard similarity of .8. Runs are interleaved; rates are
medians, per second of all processors' time and of the clock. Without `--texts` the documents are made of the glosses
that ship with Clew: twelve of them each, a quarter of the documents near copies of others.

rensa and datasketch take part if they are installed, text-dedup with the interpreter of an environment that has it
(its requirements are far from Clew's). The truth is every pair of texts with a similarity of .8 or more, found exactly:
two such sets share one of their first |x| - ceil(.8 |x|) + 1 shingles in a common order (Chaudhuri et al. 2006).

    precision   share of the dropped texts that have a twin among those kept
    recall      share of the pairs of twins of which not both were kept
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import resource
import statistics
import subprocess
import tarfile
import tempfile
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cl.corpus import Corpus
from pipelines.execute import execute
from pipelines.plan import Plan, Step, build_plan, parse_stages, segments
from pipelines.rounds import here, run_rounds
from pipelines.run_steps import run_steps
from pipelines.stages.base import Rows, RowStage
from pipelines.stages.boilerplate import EMAIL, MARKUP, PHRASES, URL
from pipelines.stages.clean_text import IP, PHONE
from pipelines.stages.registry import STAGES
from tests.curation_corpora import text_corpus

ROOT = Path(__file__).resolve().parents[2]
THRESHOLD, BANDS, ROWS, SHINGLE, FRAGMENTS = 0.8, 16, 6, 3, 8
WORD = re.compile(r"\w+")


def made_texts(count: int) -> list[str]:
    """Documents of twelve shipped glosses; a quarter are near copies with up to twelve words changed."""
    table = pq.read_table(ROOT / "pipelines" / "sample" / "text" / "train.parquet")
    glosses = [text for text in table["positive"].to_pylist() if text]
    rng = np.random.default_rng(0)
    texts: list[str] = []
    for _ in range(count):
        if texts and rng.random() < 0.25:
            words = texts[int(rng.integers(len(texts)))].split()
            for place in rng.integers(len(words), size=int(rng.integers(1, 13))).tolist():
                words[place] = f"word{int(rng.integers(10**6))}"
            texts.append(" ".join(words))
        else:
            texts.append(". ".join(glosses[int(i)] for i in rng.integers(len(glosses), size=12)))
    return texts


def shingles(text: str) -> set[str]:
    words = WORD.findall(text.lower())
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(len(words) - SHINGLE + 1, min(len(words), 1)))}


def twins(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Every pair with a Jaccard similarity of `THRESHOLD` or more."""
    sets = [shingles(text) for text in texts]
    frequency = Counter(each for one in sets for each in one)
    first: dict[str, list[int]] = defaultdict(list)
    pairs = []
    for row, mine in enumerate(sets):
        ordered = sorted(mine, key=lambda each: (frequency[each], each))
        prefix = ordered[: len(mine) - math.ceil(THRESHOLD * len(mine)) + 1]
        for other in {other for each in prefix for other in first[each]}:
            both = len(mine & sets[other])
            if both >= THRESHOLD * (len(mine) + len(sets[other]) - both) - 1e-9:
                pairs.append((other, row))
        for each in prefix:
            first[each].append(row)
    return pairs


def loop_characters(text: str) -> object:
    kinds = Counter(unicodedata.category(char)[0] for char in text if not char.isspace())
    return kinds["L"] + kinds["M"], kinds["N"], kinds["P"] + kinds["S"], sum(char.isupper() for char in text)


def loop_repetition(text: str) -> object:
    words = WORD.findall(text.lower())
    phrases = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(set(words)), len(set(phrases)), max((len(list(run)) for _, run in itertools.groupby(text)), default=0)


_BOILERPLATE = re.compile("|".join([MARKUP, *PHRASES]), re.IGNORECASE)
_ADDRESS = re.compile(f"{EMAIL}|{URL}", re.IGNORECASE)


def loop_boilerplate(text: str) -> object:
    return _BOILERPLATE.search(text), sum(len(each) for each in _ADDRESS.findall(text))


_PERSONAL = [re.compile(each, re.IGNORECASE) for each in (EMAIL, IP, PHONE)]


def loop_clean_text(text: str) -> object:
    text = ftfy.fix_text(text)
    for pattern in _PERSONAL:
        text = pattern.sub("<mark>", text)
    return " ".join(text.split())


def loop_caption(text: str) -> object:
    return len(text.split()), len(text.strip())


LOOPS = {
    "caption": loop_caption,
    "characters": loop_characters,
    "repetition": loop_repetition,
    "boilerplate": loop_boilerplate,
    "clean_text": loop_clean_text,
}


def shipped_captions() -> list[str]:
    texts = []
    for path in sorted((ROOT / "pipelines" / "sample" / "train").glob("[ce]*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".txt") else None
                texts += [file.read().decode("utf-8", "replace")] if file else []
    return texts


def texts_job(options: argparse.Namespace) -> dict[str, object]:
    texts = given_texts(options) or list(itertools.islice(itertools.cycle(shipped_captions()), options.documents))
    table = pa.table({"text": pa.array(texts, pa.string())})
    corpus = Corpus(kind="image-text", samples=len(texts), fragments=[], root="")
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        for name, loop in LOOPS.items():
            stage = STAGES[name]()
            assert isinstance(stage, RowStage)
            before = time.process_time()
            stage.run(Rows(table, np.arange(len(texts), dtype=np.int32), 0, corpus))
            seconds[name, "clew"].append(time.process_time() - before)
            before = time.process_time()
            for text in texts:
                loop(text)
            seconds[name, "loop"].append(time.process_time() - before)
    print(
        f"{len(texts):,} texts of {sum(map(len, texts)) / len(texts):.0f} characters; rows a second of processor time"
    )
    print(f"{'stage':<16}{'clew':>14}{'loop':>14}{'ratio':>8}")
    rows = []
    for name in LOOPS:
        clew, loop_rate = (len(texts) / statistics.median(seconds[name, who]) for who in ("clew", "loop"))
        print(f"{name:<16}{clew:>14,.0f}{loop_rate:>14,.0f}{clew / loop_rate:>7.1f}x")
        rows.append({"stage": name, "clew": clew, "loop": loop_rate})
    return {"texts": len(texts), "stages": rows}


def given_texts(options: argparse.Namespace) -> list[str]:
    tables = [pq.read_table(path, columns=[options.column]) for path in options.texts or ()]
    return list(pa.concat_tables(tables)[options.column].to_pylist()[: options.documents]) if tables else []


class Clew:
    """The stage `text_duplicate` over a corpus on disk, every file of it written."""

    def __init__(self, corpus: Corpus, ray: bool) -> None:
        self.corpus, self.ray = corpus, ray

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        stage = {"columns": ["positive"], "keep": "first", "threshold": THRESHOLD, "shingle": SHINGLE}
        with tempfile.TemporaryDirectory() as out:
            plan = build_plan(self.corpus, parse_stages([{"text_duplicate": stage}]), out, 0)
            if self.ray:
                execute(plan, {})
            else:
                self._here(plan)
            files = [plan.file(Step(0, "apply"), number) for number in range(len(self.corpus.fragments))]
            return pa.concat_tables(pq.read_table(file) for file in files)["drop"].is_null().to_pylist()

    def _here(self, plan: Plan) -> None:
        partial, apply = segments(plan)
        for number in range(len(self.corpus.fragments)):
            run_steps(plan, partial, number, {})
        run_rounds(plan, 0, here(plan, 0))
        for number in range(len(self.corpus.fragments)):
            run_steps(plan, apply, number, {})


def with_rensa(texts: Sequence[str]) -> list[bool]:
    import rensa

    store = rensa.RMinHashDeduplicator(THRESHOLD, BANDS * ROWS, True, BANDS, 42)
    return list(store.add_pairs([(str(row), list(shingles(text))) for row, text in enumerate(texts)]))


def with_datasketch(texts: Sequence[str]) -> list[bool]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    keep = []
    for row, text in enumerate(texts):
        signature = MinHash(num_perm=BANDS * ROWS)
        signature.update_batch([each.encode() for each in shingles(text)])
        keep.append(not index.query(signature))
        if keep[-1]:
            index.insert(row, signature)
    return keep


class TextDedup:
    """text-dedup's command on a parquet file, one process."""

    def __init__(self, python: str, folder: Path) -> None:
        self.python, self.folder = python, folder

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        source, out = self.folder / "texts.parquet", self.folder / "kept"
        pq.write_table(pa.table({"text": texts, "row": range(len(texts))}), source)
        command = [self.python, "-m", "text_dedup.minhash", "--path", "parquet", "--data_files", str(source)]
        command += ["--split", "train", "--column", "text", "--idx_column", "row", "--output", str(out)]
        command += ["--cache_dir", str(self.folder / "cache"), "--ngram", str(SHINGLE), "--min_length", "1"]
        command += ["--num_perm", str(BANDS * ROWS), "--b", str(BANDS), "--r", str(ROWS), "--num_proc", "1"]
        command += ["--threshold", str(THRESHOLD), "--hash_func", "xxh3", "--batch_size", "10000"]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "home")}
        offline.pop("PYTHONPATH", None)
        subprocess.run(command, check=True, env=offline, capture_output=True)
        read = "import sys, datasets; print(*datasets.load_from_disk(sys.argv[1])['row'])"
        kept = subprocess.run([self.python, "-c", read, str(out)], check=True, env=offline, capture_output=True)
        rows = set(map(int, kept.stdout.split()))
        return [row in rows for row in range(len(texts))]


def processor_seconds() -> float:
    """Of this process, its children and their threads."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def duplicates(options: argparse.Namespace) -> dict[str, object]:
    texts = given_texts(options) or made_texts(options.documents)
    pairs = twins(texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuts = np.array_split(np.arange(len(texts)), FRAGMENTS)
        corpus = text_corpus(folder / "corpus", [[("", texts[int(row)]) for row in part] for part in cuts])
        contenders: dict[str, Callable[[Sequence[str]], list[bool]]] = {"clew, one process": Clew(corpus, False)}
        contenders |= {"rensa": with_rensa} if installed("rensa") else {}
        contenders |= {"datasketch": with_datasketch} if installed("datasketch") else {}
        contenders |= {"text-dedup": TextDedup(options.text_dedup, folder)} if options.text_dedup else {}
        seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        kept = {}
        for _ in range(options.repeats):
            for contender, run in contenders.items():
                start, before = time.perf_counter(), processor_seconds()
                kept[contender] = run(texts)
                seconds[contender].append((time.perf_counter() - start, processor_seconds() - before))
        if options.ray:
            _on_ray(corpus, texts, options.repeats, seconds, kept)
    rows = []
    length = sum(map(len, texts)) / len(texts)
    print(f"{len(texts):,} documents of {length:.0f} characters, {len(pairs):,} pairs at {THRESHOLD} or more")
    print(f"{'':<20}{'docs/s':>10}{'docs/cpu-s':>12}{'dropped':>10}{'precision':>11}{'recall':>9}")
    for contender, times in seconds.items():
        wall, cpu = (len(texts) / statistics.median(each) for each in zip(*times, strict=True))
        mask = kept[contender]
        dropped = [row for row, keep in enumerate(mask) if not keep]
        right = {a for a, b in pairs if mask[b]} | {b for a, b in pairs if mask[a]}
        precision = sum(row in right for row in dropped) / max(len(dropped), 1)
        recall = 1 - sum(mask[a] and mask[b] for a, b in pairs) / max(len(pairs), 1)
        shown = "-" if contender == "clew on Ray" else f"{cpu:,.0f}"
        print(f"{contender:<20}{wall:>10,.0f}{shown:>12}{len(dropped):>10,}{precision:>11.4f}{recall:>9.4f}")
        rows.append(
            {"contender": contender, "documents_per_second": wall, "documents_per_processor_second": cpu}
            | {"dropped": len(dropped), "precision": precision, "recall": recall}
        )
    return {"documents": len(texts), "characters": length, "pairs": len(pairs), "contenders": rows}


def _on_ray(
    corpus: Corpus,
    texts: Sequence[str],
    repeats: int,
    seconds: dict[str, list[tuple[float, float]]],
    kept: dict[str, list[bool]],
) -> None:
    """Clew on two CPUs of Ray, whose start is not counted; processor time is that of other processes, so unknown."""
    from cluster.session import ray_session

    with ray_session(num_cpus=2):
        run = Clew(corpus, True)
        run(texts)
        for _ in range(repeats):
            start = time.perf_counter()
            kept["clew on Ray"] = run(texts)
            seconds["clew on Ray"].append((time.perf_counter() - start, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("job", choices=["duplicates", "texts"])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--texts", nargs="*", help="parquet files, in place of texts that ship with Clew")
    parser.add_argument("--column", default="text", help="of --texts")
    parser.add_argument("--text-dedup", metavar="PYTHON", help="an interpreter that has text-dedup")
    parser.add_argument("--ray", action="store_true", help="also on Ray, with two CPUs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    result = {"duplicates": duplicates, "texts": texts_job}[options.job](options)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
