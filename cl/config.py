"""Configs: YAML in, a validated pydantic model out, every field open to an override.

    cfg = load_config(TrainConfig, "train", "sample-clip", ["optimizer.lr=1e-3"])

A config is found by path or by the name of one that ships with Clew (`configs/<kind>/<name>.yaml`). A file may
say `extends: NAME` to start from another of its kind. A field that does not exist, or has the wrong type, is
refused with its full name, the value and what would be accepted.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cl.errors import ConfigError


class Config(BaseModel):
    """Base of every config model: unknown fields are errors and a loaded config never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number (YAML 1.1 reads it as text) and a repeated key is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    repeated = {key for key in keys if keys.count(key) > 1}
    if repeated:
        raise ConfigError(f"{node.start_mark.name}: field {sorted(map(str, repeated))[0]!r} is given twice.")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def configs_dir() -> Path:
    """The folder of shipped configs: inside the wheel, or at the top of a checkout."""
    packaged = Path(__file__).parent / "_configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def shipped_configs(kind: str) -> dict[str, Path]:
    """Name -> path of every shipped config of a kind (`train`, `curate`, `recipes`, ...)."""
    return {path.stem: path for path in sorted((configs_dir() / kind).glob("*.yaml"))}


def find_config(kind: str, name: str) -> Path:
    """The file behind a config's path or shipped name; recipes answer to `train` as well."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    kinds = [kind, "recipes"] if kind == "train" else [kind]
    known = {stem: file for each in reversed(kinds) for stem, file in shipped_configs(each).items()}
    if name in known:
        return known[name]
    if path.suffix or "/" in name:
        raise ConfigError(f"Config file {name} does not exist.")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"No {kind} config is called {name!r}: give a path or one of {', '.join(known) or 'none'}.{hint}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse one YAML file whose top level is a mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.load(file, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of fields, not a {type(data).__name__}.")
    return data


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of fields in one; what `above` says wins."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def load_tree(kind: str, name: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a config, found by path or shipped name, with what it extends under them."""
    path = find_config(kind, name)
    if path in above:
        raise ConfigError(f"{path} extends itself through {' -> '.join(map(str, above))}.")
    data = read_yaml(path)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    beside = path.parent / f"{parent}.yaml"
    return merge(load_tree(kind, str(beside if beside.is_file() else parent), (*above, path)), data)


def is_override(argument: str) -> bool:
    """Whether a command-line word has the form `section.field=value`."""
    name, equals, _ = argument.partition("=")
    return bool(equals) and all(re.fullmatch(r"\w[\w-]*", part) for part in name.split("."))


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set `section.field=value` words in a tree of fields; values are YAML, list items go by number."""
    for word in overrides:
        if not is_override(word):
            raise ConfigError(f"Override {word!r} must have the form section.field=value.")
        name, _, text = word.partition("=")
        try:
            value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError as error:
            raise ConfigError(f"Override {word!r}: the value is not valid YAML ({error}).") from error
        *parents, last = name.split(".")
        node: Any = data
        for part in parents:
            if isinstance(node, list):
                node = _list_item(node, part, word)
            else:
                if not isinstance(node.get(part), (dict, list)):
                    node[part] = {}
                node = node[part]
        if isinstance(node, list):
            _list_item(node, last, word)
            node[int(last)] = value
        else:
            node[last] = value
    return data


def _list_item(items: list[Any], part: str, word: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"Override {word!r}: {part!r} must be a position from 0 to {len(items) - 1}.")
    return items[int(part)]


def load_config(model: type[C], kind: str, name: str | None, overrides: Iterable[str] = ()) -> C:
    """Read a config by path or shipped name, apply overrides and validate it.

    Args:
        model: the pydantic model of this kind of run.
        kind: the folder of shipped configs to look in (`train`, `curate`, `sweep`, `eval`, ...).
        name: a path, a shipped name, or None to start from the model's defaults.
        overrides: words of the form `section.field=value`; the value is YAML.

    Raises:
        ConfigError: one sentence with the field, the value and what is accepted.
    """
    data = load_tree(kind, name) if name is not None else {}
    return parse_config(model, apply_overrides(data, overrides), where=name or f"{kind} config")


def parse_config(model: type[C], data: Mapping[str, Any], where: str) -> C:
    """Validate a tree of fields; `where` names its origin in the error."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, model)}") from error


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, in the order of its fields."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def config_digest(config: BaseModel | Mapping[str, Any]) -> str:
    """16 hex digits that change with any field's value."""
    data = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).hexdigest()


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first validation error (and how many more) as one sentence."""
    errors = error.errors()
    first = errors[0]
    name = ".".join(str(part) for part in first["loc"]) or "the config"
    if first["type"] == "extra_forbidden":
        fields = _fields_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        text = f"unknown field {name!r} (value {_short(first['input'])}).{hint} Accepted here: {', '.join(fields)}."
    elif first["type"] == "missing":
        text = f"field {name!r} is required and was not given."
    else:
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        text = f"field {name!r} has the value {_short(first['input'])}, but: {message}."
    more = len(errors) - 1
    return text + (f" ({more} more field{'s' if more > 1 else ''} to mend.)" if more else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """The field names accepted at a location of nested (optional, list or tagged) models."""
    models = _models_in(model)
    for part in location:
        below: list[type[BaseModel]] = []
        for each in models:
            if isinstance(part, str) and part in each.model_fields:
                below += _models_in(each.model_fields[part].annotation)
        # A list position or the tag of a union does not descend into a field.
        models = below or models
    return sorted({field for each in models for field in each.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is None and not isinstance(annotation, types.UnionType):
        return []
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]
