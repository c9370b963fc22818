"""Registries: what Clew can be told to use by name, its own and a user's.

A registry fills itself on first use: it imports every module below one package, then the entry points of one group,
so a user's package adds a tower, an objective, a stage, a metric or a callback without touching Clew:

    [project.entry-points."clew.objectives"]
    my_loss = "my_package.losses:MyLoss"
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Generic, TypeVar

from cl.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered thing: its name, one sentence on it, and the title of the paper it comes from ('' if none)."""

    name: str
    summary: str
    paper: str
    value: T


class Registry(Generic[T]):
    """Name -> class or function of one kind.

    Args:
        kind: the singular, as errors name it ("objective").
        package: dotted name of the package whose modules register themselves when imported.
        group: the entry-point group through which other packages add theirs.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._entries: dict[str, Entry[T]] = {}
        self._loaded = False

    def register(self, name: str, summary: str, paper: str = "") -> Callable[[T], T]:
        """Decorator that registers a class or function under `name`."""

        def add(value: T) -> T:
            if name in self._entries and self._entries[name].value is not value:
                raise ConfigError(
                    f"Two {self.kind}s are registered as {name!r}: {self._entries[name].value} and {value}."
                )
            self._entries[name] = Entry(name, summary, paper, value)
            return value

        return add

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)
        for point in metadata.entry_points(group=self.group):
            if point.name in self._entries:
                raise ConfigError(f"The {self.kind} {point.name!r} of {point.value} is already registered.")
            try:
                value: Any = point.load()
            except Exception as error:
                raise ConfigError(
                    f"The {self.kind} {point.name!r} ({point.value}) does not import: {error}."
                ) from error
            if point.name not in self._entries:  # the module may have used the decorator itself
                summary = (getattr(value, "__doc__", None) or "").strip().split("\n")[0]
                self._entries[point.name] = Entry(point.name, summary, getattr(value, "paper", ""), value)

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"No {self.kind} is called {name!r}: choose from {', '.join(sorted(self._entries))}.{hint}"
            )
        return self._entries[name].value

    def entries(self) -> list[Entry[T]]:
        """Everything registered, by name."""
        self._load()
        return [self._entries[name] for name in sorted(self._entries)]

    def rows(self) -> list[dict[str, str]]:
        """`name`, `summary` and `paper` of everything registered, for `--json` and tables."""
        return [{"name": e.name, "summary": e.summary, "paper": e.paper} for e in self.entries()]
