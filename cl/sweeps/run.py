"""`clew sweep`: trials of one training config through Ray Tune, ranked by a metric on validation corpora.

Run again on the same folder it goes on: finished trials are read from their records, interrupted ones go on from their
checkpoints, and Tune's own state (scheduler, searcher) is restored where it is there. A sweep that has finished is read
from sweep.json without starting Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cl import storage
from cl.config import config_digest, load_config
from cl.errors import ClewError, ConfigError, DataError
from cl.evaluation.config import CorpusEval
from cl.progress import Bar, progress
from cl.run import write_run_info
from cl.sweeps import space
from cl.sweeps.config import SweepConfig
from cl.sweeps.result import SWEEP, SweepResult, TrialResult, ranked, read_trial
from cl.training.config import TrainConfig
from cluster.session import Session, ray_session

if TYPE_CHECKING:
    from cl.sweeps.trial import Plan

__all__ = ["SweepConfig", "SweepResult", "sweep"]

logger = logging.getLogger(__name__)

STATE = ".tune"  # below the sweep's folder: Ray Tune's state, deleted once the sweep has finished
SLOT = "trial_slot"  # resource that a trial holds whose Ray workers hold the CPUs
PROBE = 32  # samples of each validation corpus that an untrained model is scored on before anything starts
LOST = 3  # how often a trial whose process was lost is started again
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may fail before its first score
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: Ray must be shut down
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: no tables of its own
}


def sweep(cfg: SweepConfig) -> SweepResult:
    """Run all trials of a sweep, or what is left of them, and write OUT/sweep.json.

    Raises:
        ConfigError, DataError: found before Ray starts where possible.
        ClewError: every trial failed; the sentence is that of the first.
        KeyboardInterrupt: after everything was stopped; the same command goes on.
    """
    digest = config_digest(cfg.model_dump(mode="json", exclude={"concurrency", "out"}))
    known = _finished(cfg, digest)
    if known is not None:
        logger.warning("%s is finished: nothing is left to try.", cfg.out)
        return known
    plan, mode = prepare(cfg, digest)
    with write_run_info(cfg.out, "sweep", cfg) as info:
        with _environment(), ray_session(**_cluster(cfg, plan)) as session:
            _run_tune(cfg, plan, mode, session)
        result = _collect(cfg, plan, mode)
        storage.write_json(storage.join(cfg.out, SWEEP), result.model_dump())
        failed = [trial for trial in result.trials if trial.status == "failed"]
        if len(failed) == len(result.trials):
            raise ClewError(f"Every trial of {cfg.out} failed; {failed[0].id}: {failed[0].error}")
        if not failed:
            shutil.rmtree(os.path.join(plan.out, STATE), ignore_errors=True)
        info.add(trials=len(result.trials), failed=len(failed), best=result.best.id if result.best else None)
    return result


def _finished(cfg: SweepConfig, digest: str) -> SweepResult | None:
    """The result of this very sweep if nothing of it is left to do."""
    path = storage.join(cfg.out, SWEEP)
    if not storage.exists(path):
        return None
    data = storage.read_json(path)
    if not isinstance(data, dict) or data.get("digest") != digest:
        return None
    result = SweepResult.model_validate(data)
    done = all(trial.status in ("finished", "stopped") for trial in result.trials)
    return result if done and result.trials else None


def prepare(cfg: SweepConfig, digest: str) -> tuple[Plan, str]:
    """Find what the user has to mend before Ray starts; returns what the trials share, and whether to maximise.

    Every setting of a list is validated; one is built, and scored untrained on a few samples.
    """
    from cl.encoders import build_inputs, build_model
    from cl.evaluation.embed import Encoder, pick_device
    from cl.sweeps.trial import Plan, Scorer
    from cl.training.launch import absolute
    from cl.training.run import check_run

    overrides = [
        *_leaves(cfg.train),
        f"out={json.dumps(cfg.out)}",
        "steps=null",
        "epochs=null",
        f"samples={cfg.samples}",
    ]
    base = absolute(load_config(TrainConfig, "train", cfg.base, overrides))
    validation = {name: _absolute(spec) for name, spec in cfg.validation.items()}
    scorer = Scorer(validation, cfg.metric, cfg.batch_size, cfg.precision == "bf16")
    plan = Plan(
        base=base.model_dump(mode="json"),
        samples=cfg.samples,
        warmup=cfg.warmup,
        evaluations=cfg.evaluations,
        scorer=scorer,
        threads=max(1, math.ceil(cfg.cpus_per_trial)),
        out=os.path.abspath(cfg.out),
        sweep=digest,
        attempt=uuid.uuid4().hex,
    )
    settings = [space.first(cfg)] if cfg.searcher == "optuna" else space.listed(cfg)
    configs = [plan.config(parameters) for parameters in settings]
    for each in configs:
        if each.workers.count != base.workers.count:
            raise ConfigError("space: workers.count is the same for all trials of a sweep; set it in `train`.")
        if each.total_steps(0) < cfg.evaluations:
            raise ConfigError(
                f"samples={cfg.samples} is {each.total_steps(0)} steps at batch_size={each.batch_size}: too few for "
                f"{cfg.evaluations} evaluations."
            )
    check_run(configs[0])
    model, inputs = build_model(configs[0].model), build_inputs(configs[0].model, train=False)
    probe = scorer.encoder(Encoder(model, inputs, pick_device("cpu"), cfg.batch_size), limit=PROBE)
    return plan, "max" if probe.higher_is_better else "min"


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """A tree of fields as overrides, one a leaf."""
    found: list[str] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={json.dumps(value)}")
    return found


def _absolute(spec: CorpusEval) -> CorpusEval:
    path = spec.path if "://" in spec.path else os.path.abspath(os.path.expanduser(spec.path))
    return spec.model_copy(update={"path": path})


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Tune reads its settings from the environment, some of them in the processes of the trials."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    log = logging.getLogger("ray.tune")
    level = log.level
    log.setLevel(logging.CRITICAL)  # the error of a failed trial is in its record; Tune would print its traceback twice
    try:
        yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _workers(plan: Plan) -> TrainConfig:
    return TrainConfig.model_validate(plan.base)


def _cluster(cfg: SweepConfig, plan: Plan) -> dict[str, Any]:
    """The local Ray of a sweep: exactly what the trials that run at a time hold."""
    workers = _workers(plan).workers
    if workers.count == 0:
        return {"num_cpus": max(1, math.ceil(cfg.concurrency * cfg.cpus_per_trial))}
    return {
        "num_cpus": math.ceil(cfg.concurrency * workers.count * workers.cpus),
        "resources": {SLOT: cfg.concurrency},
        "dashboard": True,  # without it Tune does not release what a stopped trial's workers held
    }


def _resources(cfg: SweepConfig, plan: Plan, session: Session) -> dict[str, float]:
    """What a trial itself holds."""
    import ray

    workers = _workers(plan).workers
    if workers.count == 0:
        return {"CPU": cfg.cpus_per_trial} | ({"GPU": cfg.gpus_per_trial} if cfg.gpus_per_trial else {})
    if session.dashboard is None and cfg.scheduler is not None:
        raise ConfigError(
            "This Ray runs without its dashboard, through which Ray Tune frees what a stopped trial's workers held: "
            "start it with the dashboard, or use scheduler=none or train.workers.count=0."
        )
    if SLOT in ray.cluster_resources():
        return {"CPU": 0, SLOT: 1}
    return {"CPU": 0, "memory": 1}  # a byte: a trial must hold something, and the CPUs are for its workers


def _run_tune(cfg: SweepConfig, plan: Plan, mode: str, session: Session) -> None:
    from ray import tune

    from cl.sweeps.trial import run_trial

    def trial(config: dict[str, Any]) -> None:
        run_trial(plan, config.get("trial", config))

    folder = os.path.join(plan.out, STATE, plan.sweep)
    trainable = tune.with_resources(trial, _resources(cfg, plan, session))
    settings: list[space.Parameters] = [] if cfg.searcher == "optuna" else space.listed(cfg)
    many = len(settings) or cfg.trials or 0
    with progress("Sweeping", total=many * cfg.evaluations, unit="evaluations") as bar:
        tuner = _restored(folder, trainable)
        if tuner is None:
            shutil.rmtree(folder, ignore_errors=True)
            tuner = tune.Tuner(
                trainable,
                param_space={"trial": tune.grid_search(settings)} if settings else None,
                tune_config=tune.TuneConfig(
                    metric="value",
                    mode=mode,
                    num_samples=1 if settings else many,
                    scheduler=_scheduler(cfg),
                    search_alg=None if settings else _optuna(cfg, mode),
                    max_concurrent_trials=cfg.concurrency,
                    reuse_actors=False,  # Ray 2.60 loses a slot when a stopped trial's actor is to be reused
                ),
                run_config=tune.RunConfig(
                    name=plan.sweep,
                    storage_path=os.path.dirname(folder),
                    failure_config=tune.FailureConfig(max_failures=LOST),
                    callbacks=[_watcher(bar, cfg, mode)],
                    verbose=0,
                ),
            )
        tuner.fit()
        bar.update(bar.total)


def _restored(folder: str, trainable: Any) -> Any:
    """Tune's own state of an interrupted sweep, or None if there is none that it can read."""
    from ray import tune

    if not os.path.isdir(folder) or not tune.Tuner.can_restore(folder):
        return None
    try:
        return tune.Tuner.restore(folder, trainable, resume_unfinished=True, restart_errored=True)
    except Exception as error:  # a snapshot half written when the driver was killed; the trials' records are whole
        logger.warning("Ray Tune cannot read its state in %s (%s): the sweep is planned anew.", folder, error)
        return None


def _scheduler(cfg: SweepConfig) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if cfg.scheduler is None:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="evaluation",
        max_t=cfg.evaluations + 1,  # the last report comes when the trial has ended by itself
        grace_period=cfg.scheduler.grace,
        reduction_factor=cfg.scheduler.reduction,
    )


def _optuna(cfg: SweepConfig, mode: str) -> Any:
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(space.distributions(cfg), metric="value", mode=mode, seed=cfg.seed)


def _watcher(bar: Bar, cfg: SweepConfig, mode: str) -> Any:
    """A Tune callback that moves the bar; a stopped trial counts with the evaluations it will not need."""
    from ray import tune

    class Watcher(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            self._show(trials)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._show(trials)

        def _show(self, trials: list[Any]) -> None:
            over = [trial for trial in trials if trial.is_finished()]
            running = [trial.last_result.get("evaluation", 0) for trial in trials if not trial.is_finished()]
            values = [trial.last_result["value"] for trial in trials if "value" in (trial.last_result or {})]
            best = (max if mode == "max" else min)(values, default=None)
            note = f"{len(over)} trials over" + ("" if best is None else f", best {best:.4g}")
            bar.update(len(over) * cfg.evaluations + sum(running), note=note)

        def __getstate__(self) -> dict[str, Any]:
            return {}  # a bar is not part of Tune's state

    return Watcher()


def _collect(cfg: SweepConfig, plan: Plan, mode: str) -> SweepResult:
    """Read the records of the sweep's trials."""
    if cfg.searcher == "optuna":
        folders = sorted(os.listdir(os.path.join(plan.out, "trials")))
        records = [read_trial(plan.folder(name)) for name in folders]
        trials = [record for record in records if record is not None and record.sweep == plan.sweep]
    else:
        trials = []
        for parameters in space.listed(cfg):
            folder = plan.config(parameters).out
            empty = TrialResult(id=os.path.basename(folder), parameters=parameters, status="not started")
            trials.append(read_trial(folder) or empty)
    if not trials:
        raise DataError(f"{cfg.out} holds no trial, though the sweep has ended: is it on storage all nodes share?")
    for trial in trials:
        if trial.status == "running":
            trial.status = "stopped"
    trials = ranked(trials, mode)
    chances = [e.chance for trial in trials for e in trial.evaluations if e.chance is not None]
    return SweepResult(
        metric=cfg.metric,
        mode="max" if mode == "max" else "min",
        chance=chances[0] if chances else None,
        best=trials[0] if trials[0].status == "finished" else None,
        trials=trials,
        axes=list(cfg.space),
        samples=cfg.samples,
        digest=plan.sweep,
    )
