"""What `clew objectives` shows: all objectives with what they need and keep, or one with its parameters."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cl.objectives.base import OBJECTIVES


def objective_rows() -> list[dict[str, str]]:
    """One row an objective, by name."""
    rows = []
    for entry in OBJECTIVES.entries():
        cls = entry.value
        rows.append(
            {
                "name": entry.name,
                "family": _family(cls.__module__),
                "summary": entry.summary,
                "compares": cls.compares,
                "needs": ", ".join(cls.needs),
                "state": ", ".join(cls.state),
                "memory": cls.memory,
                "paper": entry.paper,
            }
        )
    return rows


def parameter_rows(name: str) -> list[dict[str, str]]:
    """One row a parameter of an objective: field, type, default, range and meaning."""
    return [
        {
            "parameter": field,
            "type": _type(info.annotation),
            "default": "" if info.default is PydanticUndefined else str(info.default),
            "range": _range(info),
            "meaning": info.description or "",
        }
        for field, info in OBJECTIVES[name].Config.model_fields.items()
    ]


def formula(name: str) -> str:
    """The text at the head of the objective's file: its formula and its source."""
    module = inspect.getmodule(OBJECTIVES[name])
    return inspect.cleandoc((module.__doc__ if module else None) or "")


def markdown() -> str:
    """The table of objectives for the documentation."""
    lines = [
        "| objective | what it is | compares | needs beside | state | memory | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    family = ""
    for row in sorted(objective_rows(), key=lambda row: (row["family"], row["name"])):
        if row["family"] != family:
            family = row["family"]
            lines.append(f"| **{family}** | | | | | | |")
        columns = ("summary", "compares", "needs", "state", "memory", "paper")
        cells = [f"`{row['name']}`", *(row[key] for key in columns)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _family(module: str) -> str:
    parts = module.split(".")
    return parts[2] if module.startswith("cl.objectives.") and len(parts) > 3 else "yours"


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "none"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (list, tuple, dict, set):
        inside = ", ".join("..." if each is Ellipsis else _type(each) for each in arguments)
        return f"{origin.__name__} of {inside}" if origin is not dict else f"mapping of {inside}"
    if arguments:
        return " | ".join(_type(each) for each in arguments)
    return getattr(annotation, "__name__", str(annotation))


def _range(info: FieldInfo) -> str:
    signs = {
        annotated_types.Gt: (">", "gt"),
        annotated_types.Ge: (">=", "ge"),
        annotated_types.Lt: ("<", "lt"),
        annotated_types.Le: ("<=", "le"),
    }
    bounds = []
    for constraint in info.metadata:
        if type(constraint) in signs:
            sign, field = signs[type(constraint)]
            bounds.append(f"{sign} {getattr(constraint, field):g}")
    return ", ".join(bounds)
