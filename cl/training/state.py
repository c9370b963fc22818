"""What a run has to keep to go on as if nothing had happened: into a checkpoint and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from cl.config import dump_config
from cl.encoders.teacher import EmaTeacherConfig
from cl.errors import DataError
from cl.memory.shards import everyones, load_tables, save_tables, tables_of
from cl.training.checkpoint import TABLES, Checkpoint, SavedModel, prune_checkpoints, save_checkpoint, tables_folder
from cl.training.config import TrainConfig
from cl.training.finite import Guard
from cl.training.full_state import gathered, load_whole, load_whole_optimizer
from cl.training.step import TrainStep


class Whole(NamedTuple):
    """Tensors of model, teachers by name, and optimizer, none of them sharded."""

    model: dict[str, Tensor]
    teachers: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]


@dataclass
class RunState:
    """Weights, teachers that follow them, objective, optimizer, and how far the run is.

    Attributes:
        module: towers, teachers and objective.
        optimizer: of all that is trained.
        guard: which steps were left out.
        plan: digest of the order of samples (`BatchPlan.digest`).
        step: optimizer steps done.
        seconds: of training up to `step`, lost work not counted.
    """

    module: TrainStep
    optimizer: Optimizer
    guard: Guard
    plan: str
    step: int = 0
    seconds: float = 0.0

    def restore(self, checkpoint: Checkpoint, out: str) -> None:
        """Go on from a checkpoint.

        Raises:
            DataError: it belongs to another order of samples.
        """
        state = checkpoint.trainer_state()
        if state["plan"] != self.plan:
            raise DataError(
                f"{checkpoint.url} was made with other corpora, seed or batch size than {out} is to go on with: the "
                "order of samples would not be the same."
            )
        load_whole(self.module.model, checkpoint.model_state())
        for name, teacher in self._followers().items():
            load_whole(teacher.model, checkpoint.teacher_state(name))
        self.module.objective.load_state_dict(state["objective"])
        load_whole_optimizer(self.optimizer, state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        names = [name.removeprefix(f"{TABLES}/") for name in checkpoint.files if name.startswith(f"{TABLES}/")]
        load_tables(self.module.objective, names, lambda name: checkpoint.read(f"{TABLES}/{name}"), self.module.workers)
        self.step, self.seconds = state["step"], state["seconds"]

    def save_tables(self, cfg: TrainConfig) -> list[str]:
        """Write what the objective keeps for each sample; all workers do it, before one of them saves.

        Returns:
            the names of all workers' files.
        """
        module = self.module
        if not tables_of(module.objective):
            return []
        names = save_tables(module.objective, tables_folder(cfg.checkpoint_url, self.step), module.workers)
        return everyones(names, module.workers)

    def whole(self, keep: bool) -> Whole:
        """Everything that may be sharded, gathered; all workers call it, and those that `keep` it get the tensors."""
        module = self.module
        return Whole(
            gathered(module.model.state_dict(), keep),
            {name: gathered(teacher.model.state_dict(), keep) for name, teacher in self._followers().items()},
            gathered(self.optimizer.state_dict(), keep),
        )

    def save(
        self,
        cfg: TrainConfig,
        whole: Whole,
        total_steps: int,
        position: tuple[int, int],
        tables: Sequence[str] = (),
    ) -> None:
        """Commit a checkpoint and delete those that need not be kept; one worker does it.

        Args:
            cfg: the run.
            whole: what `whole` gave this worker.
            total_steps: its length.
            position: (epoch, step of the epoch) of the next batch.
            tables: what `save_tables` gave.
        """
        epoch, within = position
        state = {
            "step": self.step,
            "total_steps": total_steps,
            "position": {"epoch": epoch, "step": within},
            "plan": self.plan,
            "seed": cfg.seed,  # with the step it gives every random number that follows
            "seconds": self.seconds,
            "workers": self.module.workers.size,
            "objective": self.module.objective.state_dict(),
            "optimizer": whole.optimizer,
            "guard": self.guard.state_dict(),
        }
        model = SavedModel(self.module.model, cfg.model, whole.model)
        teachers = {
            name: SavedModel(teacher.model, teacher.model_config, whole.teachers[name])
            for name, teacher in self._followers().items()
        }
        root = cfg.checkpoint_url
        save_checkpoint(root, self.step, model, state, dump_config(cfg), teachers, tables)
        prune_checkpoints(root, cfg.checkpoint.keep_last, self.step)

    def _followers(self) -> dict:
        """The teachers that change; frozen ones come from where they always did."""
        return {
            name: teacher
            for name, teacher in self.module.teachers.items()
            if isinstance(teacher.config, EmaTeacherConfig)
        }
