"""The registry of curation stages: Clew's own, and a user's through the entry points `clew.stages`."""

from __future__ import annotations

from collections.abc import Callable

from cl.registry import Registry
from pipelines.stages.base import Stage


class StageRegistry(Registry[type[Stage]]):
    """A registry that tells each stage its name, which columns, reasons and errors carry."""

    def register(self, name: str, summary: str, paper: str = "") -> Callable[[type[Stage]], type[Stage]]:
        """Decorator that registers a stage's class under `name`."""
        add = super().register(name, summary, paper)

        def name_and_add(value: type[Stage]) -> type[Stage]:
            value.name = name
            return add(value)

        return name_and_add


STAGES = StageRegistry(kind="stage", package="pipelines.stages", group="clew.stages")
