"""Training configs of other projects as Clew's, and what of them has no equivalent: `clew import-config`."""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml


class Note(NamedTuple):
    """A setting that did not become a field.

    Attributes:
        setting: as the other project names it, with its value.
        why: what is to know, in a sentence.
    """

    setting: str
    why: str


class Imported(NamedTuple):
    """A training config, as a tree of fields, and what was left out of it."""

    config: dict[str, Any]
    notes: list[Note]

    def to_yaml(self) -> str:
        """The config with the notes as comments above."""
        lines = [f"# {note.setting}: {note.why}\n" for note in self.notes]
        head = ["# What the original says beyond this config:\n"] if lines else []
        return "".join(head + lines) + yaml.safe_dump(self.config, sort_keys=False, default_flow_style=None, width=110)
