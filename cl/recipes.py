"""The shipped recipes: whole training configs, one a published method (`configs/recipes/*.yaml`).

A recipe opens with comment lines that say what it is; the rest is an ordinary training config:

    # summary: Sentence embeddings from two dropout views of one sentence.
    # paper: SimCSE: Simple Contrastive Learning of Sentence Embeddings
"""

from __future__ import annotations

from pathlib import Path

from cl.config import shipped_configs


def recipe_header(path: Path) -> dict[str, str]:
    """`summary` and `paper` from the comment lines at the top of a config; '' for what is not said."""
    header = {"summary": "", "paper": ""}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        name, colon, text = line.removeprefix("#").strip().partition(":")
        if colon and name in header:
            header[name] = text.strip()
    return header


def recipe_rows() -> list[dict[str, str]]:
    """`name`, `summary` and `paper` of every shipped recipe, by name."""
    return [{"name": name, **recipe_header(path)} for name, path in shipped_configs("recipes").items()]
