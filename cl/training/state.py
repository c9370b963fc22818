"""What a run has to keep to go on as if nothing had happened: into a checkpoint and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from cl.config import dump_config
from cl.encoders.teacher import EmaTeacherConfig
from cl.errors import DataError
from cl.memory.shards import everyones, load_tables, save_tables, tables_of
from cl.training.checkpoint import TABLES, Checkpoint, prune_checkpoints, save_checkpoint, tables_folder
from cl.training.config import TrainConfig
from cl.training.step import TrainStep


@dataclass
class RunState:
    """Weights, teachers that follow them, objective, optimizer, and how far the run is.

    Attributes:
        module: towers, teachers and objective.
        optimizer: of all that is trained.
        plan: digest of the order of samples (`BatchPlan.digest`).
        step: optimizer steps done.
        seconds: of training up to `step`, lost work not counted.
    """

    module: TrainStep
    optimizer: Optimizer
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
        self.module.model.load_state_dict(checkpoint.model_state())
        for name, teacher in self._followers().items():
            teacher.model.load_state_dict(checkpoint.teacher_state(name))
        self.module.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
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

    def save(self, cfg: TrainConfig, total_steps: int, position: tuple[int, int], tables: Sequence[str] = ()) -> None:
        """Commit a checkpoint and delete those that need not be kept; one worker does it.

        Args:
            cfg: the run.
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
            "optimizer": self.optimizer.state_dict(),
        }
        teachers = {name: (teacher.model, teacher.model_config) for name, teacher in self._followers().items()}
        root = cfg.checkpoint_url
        save_checkpoint(root, self.step, self.module.model, cfg.model, state, dump_config(cfg), teachers, tables)
        prune_checkpoints(root, cfg.checkpoint.keep_last, self.step)

    def _followers(self) -> dict:
        """The teachers that change; frozen ones come from where they always did."""
        return {
            name: teacher
            for name, teacher in self.module.teachers.items()
            if isinstance(teacher.config, EmaTeacherConfig)
        }
