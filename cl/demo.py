"""`clew demo`: the whole job on the corpus that ships with Clew.

It is nothing but the public commands run one after another, each printed before it runs, so that any of them can be
copied and run by hand. One Ray serves them all. Every command goes on from where an earlier demo in the same folder
stopped, so an interrupted demo is run again.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HELD_OUT = ("unseen-drawings", "unseen-concepts", "clipart")


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's report is, and its numbers."""

    report: str
    seconds: float
    rows: list[dict[str, Any]]

    def shown(self) -> dict[str, Any]:
        """What a terminal shows below the table."""
        return {"report": self.report, "seconds": self.seconds}


def demo_commands(out: str, sample: str) -> list[list[str]]:
    """The words of each `clew` command of the demo, in order."""
    corpus, scorer, curated, model = (f"{out}/{name}" for name in ("corpus", "scorer", "curated", "model"))
    held_out = [["ingest", f"{sample}/heldout/{name}", "--out", f"{out}/heldout/{name}"] for name in HELD_OUT]
    return [
        ["ingest", f"{sample}/train", "--out", corpus],
        # No scorer ships with Clew: a short run on the raw corpus makes one, as a data filtering network would be.
        ["train", "sample-scorer", f"corpus={corpus}", f"out={scorer}", "--resume"],
        ["curate", "sample", f"corpus={corpus}", f"model={scorer}", f"out={curated}"],
        ["train", "sample-clip", f"corpus={curated}", f"out={model}", "--resume"],
        *held_out,
        ["eval", "sample", f"checkpoint={model}", f"out={out}/eval", *_corpora(out)],
        ["ingest", f"{sample}/text/train.parquet", "--out", f"{out}/text/corpus", "columns.anchor=query"],
        ["ingest", f"{sample}/text/heldout.parquet", "--out", f"{out}/text/heldout", "columns.anchor=query"],
        ["curate", "sample-text", f"corpus={out}/text/corpus", f"out={out}/text/curated"],
        ["train", "sample-text", f"corpus={out}/text/curated", f"out={out}/text/model", "--resume"],
        [
            "eval",
            "sample-text",
            f"checkpoint={out}/text/model",
            f"corpora.heldout={out}/text/heldout",
            f"out={out}/text/eval",
        ],
        [
            "sweep",
            "sample",
            f"train.corpus={curated}",
            f"validation={out}/heldout/unseen-drawings",
            f"out={out}/sweep",
        ],
    ]


def _corpora(out: str) -> list[str]:
    return [f"corpora.{name}={out}/heldout/{name}" for name in HELD_OUT]


def demo(out: str) -> DemoResult:
    """Run the demo into a folder and print one table of its numbers.

    Raises:
        ClewError: what any of its commands raises.
    """
    from rich.console import Console

    import pipelines.sample
    from cl.cli import cli
    from cl.progress import quiet
    from cluster.session import ray_session
    from pipelines.report.summary import summarise

    start = time.monotonic()
    sample = str(Path(pipelines.sample.__file__).parent)
    console = Console(stderr=True)
    with ray_session(dashboard=True):
        for words in demo_commands(out.rstrip("/"), sample):
            console.print(f"\n$ {shlex.join(['clew', *words])}", style="bold", highlight=False, soft_wrap=True)
            cli.main(words, prog_name="clew", standalone_mode=False)
    report = str(Path(out) / "report.html")
    cli.main(["report", out, "--out", report], prog_name="clew", standalone_mode=False)
    summary = summarise([out])
    if not quiet():
        Console().print(summary.table("clew demo"))
    return DemoResult(report, time.monotonic() - start, [asdict(row) for row in summary.rows])
