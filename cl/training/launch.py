"""Starts the workers of a run with Ray Train and waits for them.

Ray Train watches the workers and starts a lost group anew; every new group goes on from the newest whole checkpoint.
An error that the user has to mend is not tried again. Ray Train keeps no checkpoints of its own here: `report` only
tells it (and Ray Tune above it) where a run stands.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from cl.config import config_digest
from cl.errors import ConfigError, user_error
from cl.training.config import TrainConfig
from cluster.session import Session, ray_session

logger = logging.getLogger(__name__)

RAY_FOLDER = ".ray"  # below the run's folder: what Ray Train keeps, deleted at the end
_ENVIRONMENT = {
    # The controller looks at the workers this often, which bounds how long a report waits (2 s by default).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # keep relative paths of model configs meaningful
}


def launch(cfg: TrainConfig, callbacks: Sequence[Any] = ()) -> None:
    """Train `cfg` on `cfg.workers.count` Ray Train workers, on the Ray that is there or a local one.

    Args:
        cfg: the run.
        callbacks: `ray.train.UserCallback`s, such as Ray Tune's.

    Raises:
        ClewError: what a worker raised for the user to mend, or resources that the cluster does not have.
        RuntimeError: workers were lost more often than `cfg.workers.max_failures` allows.
        KeyboardInterrupt: after the workers were stopped.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cpus = max(os.cpu_count() or 1, math.ceil(cfg.workers.count * cfg.workers.cpus))
    storage_path = Path(cfg.out).absolute() / RAY_FOLDER
    with ray_session(num_cpus=cpus) as session:
        trainer = _Trainer(
            _ray_worker,
            train_loop_config={"config": absolute(cfg).model_dump(mode="json")},
            torch_config=TorchConfig(
                backend="nccl" if _gpus(cfg, session) else "gloo", timeout_s=cfg.workers.timeout_seconds
            ),
            scaling_config=_scaling(cfg, session),
            run_config=RunConfig(
                name=f"train-{config_digest(cfg)}",
                storage_path=str(storage_path),
                failure_config=FailureConfig(max_failures=cfg.workers.max_failures),
                callbacks=list(callbacks),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        # A snapshot of an earlier start would make Ray Train go on from its own idea of the run.
        shutil.rmtree(storage_path, ignore_errors=True)
        try:
            trainer.fit()
        except KeyboardInterrupt:
            trainer.abort()
            raise
        except Exception as error:
            mendable = user_error(error)
            if mendable is not None:
                raise mendable from None
            raise
        finally:
            shutil.rmtree(storage_path, ignore_errors=True)


def absolute(cfg: TrainConfig) -> TrainConfig:
    """The config with paths that mean the same in every worker's folder."""

    def place(path: str | None) -> str | None:
        return path if path is None or "://" in path else os.path.abspath(os.path.expanduser(path))

    data = cfg.model_dump(mode="json")
    data["out"], data["corpus"] = place(cfg.out), place(cfg.corpus)
    data["corpora"] = [{**corpus, "path": place(corpus["path"])} for corpus in data["corpora"]]
    if cfg.mixture is not None and cfg.mixture.by == "corpus":
        data["mixture"]["weights"] = {place(path): weight for path, weight in cfg.mixture.weights.items()}
    data["checkpoint"]["path"] = place(cfg.checkpoint.path)
    weights = cfg.model.weights
    data["model"]["weights"] = (
        {tower: place(source) for tower, source in weights.items()} if isinstance(weights, dict) else place(weights)
    )
    for teacher in data["teachers"].values():
        if "weights" in teacher:
            teacher["weights"] = place(teacher["weights"])
        if "embeddings" in teacher:
            teacher["embeddings"] = [place(folder) for folder in teacher["embeddings"]]
    return TrainConfig.model_validate(data)


def _gpus(cfg: TrainConfig, session: Session) -> int:
    """GPUs of each worker."""
    if cfg.workers.gpus is None:
        return int(session.gpus >= cfg.workers.count)
    return cfg.workers.gpus


def _scaling(cfg: TrainConfig, session: Session) -> ScalingConfig:
    gpus = _gpus(cfg, session)
    needed = {
        "CPU": (cfg.workers.count * cfg.workers.cpus, session.cpus),
        "GPU": (cfg.workers.count * gpus, session.gpus),
    }
    for name, (wanted, there) in needed.items():
        # A cluster that is already running may grow; a local one is what it is.
        if wanted > there and session.started:
            raise ConfigError(
                f"workers.count={cfg.workers.count} needs {wanted:g} {name}s, but this machine has {there:g}."
            )
        if wanted > there:
            logger.warning(
                "The run needs %g %ss and Ray has %g now: it waits until there are more.", wanted, name, there
            )
    resources = {"CPU": cfg.workers.cpus} | ({"GPU": gpus} if gpus else {})
    return ScalingConfig(num_workers=cfg.workers.count, use_gpu=bool(gpus), resources_per_worker=resources)


def _ray_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train

    from cl.training.loop import train_worker
    from cl.training.watch import log_to_folder

    cfg = TrainConfig.model_validate(config["config"])
    leads = ray.train.get_context().get_world_rank() == 0
    with log_to_folder(cfg.out) if leads else contextlib.nullcontext():
        train_worker(cfg, report=ray.train.report)


class _FailurePolicy(DefaultFailurePolicy):
    """Ray's own policy, but what the user has to mend fails at once: it would fail again."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if user_error(training_failed_error) is not None:
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _Trainer(TorchTrainer):
    """TorchTrainer that leaves Ctrl-C to its caller (Ray's handler ends the process with code 0 or 1)."""

    _controller: Any = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = _FailurePolicy(arguments["failure_policy"].failure_config)
        return super()._initialize_and_run_controller(**arguments)

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """Stop the workers."""
        if self._controller is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # the controller ends itself while it answers
                ray.get(self._controller.abort.remote(), timeout=10)
