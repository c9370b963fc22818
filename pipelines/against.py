"""Incremental curation: new samples judged by what a finished curation found, which is not touched.

A stage says how (`Stage.frozen`):

    statistics   thresholds, quotas, centroids, mixtures, counts: the finished run's reduction is taken over as it is,
                 and `apply` judges each new row by it
    rows         duplicates and caps of templates: the finished run's kept rows take part, come first and stay
    anew         no other row of the corpus matters, as for the stages that look at one row alone

Fragments of the finished run stand behind those of the corpus (`Plan.home`), with the columns that its own nodes have
written: nothing of them is computed again. A finished run may itself have been judged against another.
"""

from __future__ import annotations

from cl import storage
from cl.config import config_digest
from cl.errors import ConfigError, DataError
from pipelines.plan import Node, Plan
from pipelines.run_steps import read_reduced
from pipelines.stages.base import GlobalStage
from pipelines.stages.keyed import KeyedStage

UNCOMPARED = ("write", "remove")  # stages that Clew adds and that may differ


def check_against(plan: Plan, frozen: Plan) -> None:
    """Refuse a finished curation by which the rows cannot be judged.

    Raises:
        ConfigError: another kind, seed or list of stages, or a stage that cannot judge new rows by itself.
        DataError: the finished curation no longer remembers what its stages found.
    """
    mine = [node for node in plan.nodes if node.name not in UNCOMPARED]
    theirs = [node for node in frozen.nodes if node.name not in UNCOMPARED]
    if plan.corpus.kind != frozen.corpus.kind:
        raise ConfigError(f"{frozen.out} is of kind {frozen.corpus.kind}, but this corpus is {plan.corpus.kind}.")
    if plan.seed != frozen.seed:
        raise ConfigError(f"seed must be {frozen.seed}, that of the curation it goes on from ({frozen.out}).")
    if [node.name for node in mine] != [node.name for node in theirs]:
        wanted = ", ".join(node.name for node in theirs)
        raise ConfigError(f"stages must be those of {frozen.out}, whose results are frozen: {wanted}.")
    for node, other in zip(mine, theirs, strict=True):
        if _identity(node) != _identity(other):
            raise ConfigError(
                f"Stage {node.name!r} has other settings, or another model, than in {frozen.out}, whose results are "
                f"frozen: take its settings ({frozen.out}/config.yaml), or curate everything together, without against."
            )
        if isinstance(node.stage, (GlobalStage, KeyedStage)) and not node.stage.frozen:
            raise ConfigError(
                f"Stage {node.name!r} compares all samples with each other and cannot judge new ones by a finished "
                f"curation: curate everything together, without against."
            )
    _check_memory(plan, frozen)


def _identity(node: Node) -> tuple[str, str]:
    stage = node.stage
    return config_digest({"version": stage.version, "fields": stage.model_dump(mode="json")}), stage.digest()


def _check_memory(plan: Plan, frozen: Plan) -> None:
    """Whether what new rows are judged by is still there."""
    beside = any(node.stage.frozen == "rows" for node in plan.nodes)
    for node in frozen.nodes:
        missing = node.stage.frozen == "statistics" and not frozen.reduced(node.number)
        if beside and node.name != "write" and not missing:
            there = set(storage.list_files(frozen.folder(node.number, "rows"), ".parquet"))
            numbers = range(len(frozen.corpus.fragments))
            missing = any(f"{number:05d}.parquet" not in there for number in numbers)
        if missing:
            raise DataError(
                f"{frozen.out} no longer holds what its stage {node.name!r} found (.nodes): run that curation again, "
                f"which computes what is missing."
            )
    if frozen.frozen is not None:
        _check_memory(plan, frozen.frozen)


def take_over(plan: Plan) -> None:
    """Make the statistics of a finished curation those of a plan; a stage's partials are then not even computed."""
    if plan.frozen is None:
        return
    for node in plan.nodes:
        if node.stage.frozen == "statistics" and not plan.reduced(node.number):
            theirs = plan.frozen.named(node.name)
            assert theirs is not None
            table = node.stage.freeze(read_reduced(plan.frozen, theirs.number, 0))
            folder = plan.folder(node.number, "reduced")
            storage.write_table(storage.join(folder, "all.parquet"), table)
            done = {"shared": True, "seconds": 0.0, "frozen": True}
            storage.write_json(storage.join(folder, "done.json"), done)
