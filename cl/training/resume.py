"""What may go on in a folder that already holds a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from cl.config import read_yaml
from cl.errors import ConfigError
from cl.training.checkpoint import list_steps
from cl.training.config import TrainConfig
from cl.training.outcome import TrainResult, read_result

# A run may go on with other values of these: they change neither weights nor the order of samples of the steps done.
FREE = {
    "out",
    "corpus",
    "corpora",
    "steps",
    "samples",
    "epochs",
    "workers",
    "parallel",
    "not_finite",
    "checkpoint",
    "loader",
    "micro_batch",
    "log_every",
    "callbacks",
}


def differing_field(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two resolved configs differ, with both values; top-level fields in FREE do not count."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if not name and key in FREE:
                continue
            found = differing_field(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
            if found is not None:
                return found
        return None
    return None if old == new else (name, old, new)


def prepare_folder(cfg: TrainConfig, resume: bool) -> TrainResult | None:
    """Decide what the run does with its folder, before anything is written.

    Returns:
        the result if the very same run has finished there; else None, and the run may start or go on.

    Raises:
        ConfigError: the folder holds another run, or one that is not finished and `resume` was not asked for.
    """
    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out is {out}, which is a file; give a folder.")
    before = out / "config.yaml"
    steps = list_steps(cfg.checkpoint_url)
    if not before.exists():
        if steps and not resume:
            raise ConfigError(
                f"{cfg.checkpoint_url} already holds checkpoints (step {steps[0]}): give another checkpoint.path, or "
                "--resume to go on from them."
            )
        return None
    resolved = cfg.model_dump(mode="json")
    old = read_yaml(before)
    differing = differing_field(old, resolved)
    if differing is not None:
        name, was, now = differing
        raise ConfigError(
            f"{out} holds a run with {name}={was!r}, but this config has {name}={now!r}: give another out, or the "
            "run's own value."
        )
    result = read_result(cfg.out)
    same_length = all(old.get(field) == resolved[field] for field in ("steps", "samples", "epochs"))
    if result is not None and same_length:
        return result
    if not resume and (steps or result is not None):
        raise ConfigError(
            f"{out} holds a run that stopped at step {steps[0] if steps else 0}: add --resume to go on with it, or "
            "give another out."
        )
    if not resume:
        _clear(out)
    return None


def _clear(out: Path) -> None:
    """Forget a run that ended before its first checkpoint."""
    (out / "metrics.jsonl").unlink(missing_ok=True)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
