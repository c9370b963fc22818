"""Runs of the shipped recipes at toy size, and what is seen of them from within."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cl.config import load_config
from cl.encoders import EncoderModel, load_checkpoint_model
from cl.engine.outcome import Outcome
from cl.objectives import Objective
from cl.pairs import Pairs
from cl.training.callbacks import CALLBACKS, Callback, Progress
from cl.training.config import TrainConfig
from cl.training.run import train

STEPS = 50
# Sizes alone: what a recipe says otherwise holds.
TOY = (
    "epochs=null",
    "samples=null",
    f"steps={STEPS}",
    "batch_size=16",
    "optimizer.lr=3e-3",
    "schedule.warmup_steps=5",
    "precision=fp32",
    "workers.count=0",
    "log_every=1",
    f"checkpoint.every_steps={STEPS}",
    "loader.threads=1",
    'callbacks=[{"name": "witness"}]',
)
IMAGE = 'model.towers.image.config={"image_size": 16, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}'
TEXT = 'model.towers.text.config={"vocab_size": 600, "context_length": 16, "width": 16, "heads": 2, "layers": 1}'


@dataclass
class Seen:
    """A run from within; of objective and batch, what the last step was given.

    Attributes:
        cfg: the run.
        model: the towers, trained.
        pairs: of the last step, with embeddings as they were.
        start, state: the objective's tensors before the first step and before the last.
        outcome: the last step's.
        weights: the towers' tensors at the start, and after each step.
        records: of metrics, one a step.
    """

    cfg: TrainConfig
    model: Any = None
    pairs: Any = None
    start: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    outcome: Any = None
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def moved(self, start: str, step: int = STEPS) -> bool:
        """Whether any of the towers' tensors whose names start so is another after a step than at first."""
        names = [name for name in self.weights[0] if name.startswith(start)]
        assert names, start
        return any(not torch.equal(self.weights[0][name], self.weights[step][name]) for name in names)

    def of(self, prefix: str) -> dict[str, Tensor]:
        """The objective's tensors below a name."""
        return {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}

    def followed(self, prefix: str) -> bool:
        """Whether all matrices of the objective below a name have moved since the first step."""
        names = [name for name in self.state if name.startswith(prefix) and self.state[name].dim() > 1]
        assert names, prefix
        return not any(torch.equal(self.start[name], self.state[name]) for name in names)

    def losses(self, name: str = "loss") -> tuple[float, float]:
        """The mean of a metric over the first five steps, and over the last."""
        values = [float(record[name]) for record in self.records]
        return sum(values[:5]) / 5, sum(values[-5:]) / 5


WITNESS: list[Seen] = []


@CALLBACKS.register("witness", "test: keep what a run does")
class Witness(Callback):
    def on_start(self, progress: Progress) -> None:
        seen = WITNESS[-1]
        assert isinstance(progress.model, EncoderModel)
        seen.model = progress.model
        seen.weights.append(_copy(progress.model.state_dict()))

        def before(module: Objective, inputs: tuple[Any, ...]) -> None:
            seen.pairs, seen.state = inputs[0], _copy(module.state_dict())
            seen.start = seen.start or seen.state

        def after(module: Objective, inputs: tuple[Any, ...], outcome: Outcome) -> None:
            seen.outcome = outcome

        progress.objective.register_forward_pre_hook(before)
        progress.objective.register_forward_hook(after)

    def on_record(self, progress: Progress, record: dict[str, Any]) -> None:
        WITNESS[-1].weights.append(_copy(progress.model.state_dict()))
        WITNESS[-1].records.append(record)


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def run_recipe(name: str, corpus: str, out: Path, *words: str) -> Seen:
    """Train a recipe with its YAML and overrides as `clew train` takes them."""
    cfg = load_config(TrainConfig, "train", name, [f"out={out}", f"corpus={corpus}", *TOY, IMAGE, *words])
    seen = Seen(cfg)
    WITNESS.append(seen)
    train(cfg)
    WITNESS.pop()
    assert len(seen.records) == STEPS
    assert isinstance(seen.pairs, Pairs)
    assert (seen.pairs.weights() == 1).all()
    return seen


def unit_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def clip_loss(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """Radford et al. 2021, figure 3."""
    logits, own = scale * first @ second.T, torch.arange(len(first))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, algorithm 1: among 2N views, the other view of the same picture."""
    both, count = torch.cat([first, second]), len(first)
    logits = (both @ both.T / temperature).fill_diagonal_(-torch.inf)
    return cross_entropy(logits, torch.arange(2 * count).roll(count))


def averaged(
    seen: Seen, momentum: float, teacher: str, constant: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The moving average of the towers by formula (momentum constant, or a cosine to 1), and the checkpoint's own."""
    slow = dict(seen.weights[0])
    for step, now in enumerate(seen.weights[1:]):
        rise = 1.0 if constant else (1 + torch.cos(torch.tensor(torch.pi * step / STEPS)).item()) / 2
        share = (1 - momentum) * rise
        slow = {name: value + share * (now[name] - value) for name, value in slow.items()}
    own = load_checkpoint_model(f"{seen.cfg.out}/checkpoints/step-{STEPS:08d}/teachers/{teacher}")[0].state_dict()
    return {name: slow[name] for name in own}, own
