"""Teachers: models without gradient whose embeddings are further views of the batch, called VIEW_TEACHER.

    teachers:
      ema: {kind: ema, views: [image_1, image_2], momentum: 0.996}    # image_1_ema, image_2_ema
      big: {kind: frozen, weights: runs/large-clip, views: [image]}   # image_big
      old: {kind: stored, embeddings: runs/embeddings}                # image_old, text_old

An `ema` teacher follows the towers that it reads its views with (He et al. 2020, "Momentum Contrast for Unsupervised
Visual Representation Learning", eq. 2):

    teacher <- m teacher + (1 - m) towers          after every optimizer step
    m(k)     = 1 - (1 - m_0) (1 + cos(pi k / K)) / 2     step k of K from 0 (Grill et al. 2020, "Bootstrap Your Own
                                                         Latent", section 3.2), or m_0 throughout

A `frozen` teacher is a model of its own: a Clew checkpoint or run with its own towers, picture size and tokenizer, or
an open_clip .safetensors file for towers like those that are trained. A `stored` teacher is what `clew embed` wrote of
the corpora that are trained on: the embeddings of whole samples, without augmentation. Teachers run in evaluation mode:
no dropout. An `ema` teacher gives whatever its views give (`image_1_features_ema`), the others their embeddings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cl import storage
from cl.batches.stored import StoredView, open_stored
from cl.config import Config
from cl.corpus import Corpus
from cl.encoders.checkpoint import checkpoint_config, find_checkpoint, load_checkpoint_model, localised
from cl.encoders.config import ModelConfig
from cl.encoders.inputs import Inputs, TextInput, ViewInput
from cl.encoders.model import EncoderModel, ViewTensor, build_inputs, build_model
from cl.errors import ConfigError


class _TeacherConfig(Config):
    views: list[str] | None = Field(None, description="views of the model that it embeds as well; null: all")


class EmaTeacherConfig(_TeacherConfig):
    """A moving average of the towers in training."""

    kind: Literal["ema"] = Field(description="an average of the towers in training")
    momentum: float = Field(0.996, ge=0, le=1, description="share of the teacher that stays in a step, at the start")
    momentum_schedule: Literal["cosine", "constant"] = Field("cosine", description="cosine: rises to 1 at the end")

    def momentum_at(self, step: int, total_steps: int) -> float:
        """The momentum of a step, from 0 on."""
        if self.momentum_schedule == "constant":
            return self.momentum
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * min(step / total_steps, 1.0))) / 2


class FrozenTeacherConfig(_TeacherConfig):
    """A model that does not change."""

    kind: Literal["frozen"] = Field(description="a model that does not change")
    weights: str = Field(
        description="a Clew checkpoint or run with towers of its own, or an open_clip .safetensors file for ours"
    )

    @property
    def borrows_towers(self) -> bool:
        """Whether its towers are built like those in training."""
        return self.weights.endswith(".safetensors")


class StoredTeacherConfig(_TeacherConfig):
    """Embeddings on disk."""

    kind: Literal["stored"] = Field(description="embeddings that clew embed wrote")
    embeddings: list[str] = Field(
        min_length=1, description="folder or URL of clew embed's output; of several corpora a list, in their order"
    )

    @field_validator("embeddings", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def _by_kind(value: Any) -> Any:
    """Validate a teacher with the config of its kind."""
    kinds: dict[Any, type[_TeacherConfig]] = {
        "ema": EmaTeacherConfig,
        "frozen": FrozenTeacherConfig,
        "stored": StoredTeacherConfig,
    }
    if not isinstance(value, dict):
        return value
    if value.get("kind") not in kinds:
        raise ValueError("a teacher has the field kind, which is ema, frozen or stored")
    return kinds[value["kind"]].model_validate(value)


AnyTeacherConfig = EmaTeacherConfig | FrozenTeacherConfig | StoredTeacherConfig
TeacherConfig = Annotated[AnyTeacherConfig, BeforeValidator(_by_kind)]


def teacher_view(view: str, teacher: str) -> str:
    """What a teacher's embedding of a view is called in the batch."""
    return f"{view}_{teacher}"


class Teacher(nn.Module):
    """A model without gradient that embeds some views of the batch.

    Args:
        name: as the config calls it.
        config: its settings.
        model: towers; they lose their gradients and stay in evaluation mode.
        model_config: what `model` is built from.
        views: the views of the batch that it embeds.
    """

    def __init__(
        self,
        name: str,
        config: AnyTeacherConfig,
        model: EncoderModel,
        model_config: ModelConfig,
        views: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.name, self.config, self.model_config = name, config, model_config
        self.views = dict(views)
        self.model = model.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Teacher:
        """A teacher is always in evaluation mode."""
        return super().train(False)

    @property
    def outputs(self) -> list[str]:
        """The names of what it gives in the batch."""
        return [name for view in self.views for name in self._outputs(view)]

    def _outputs(self, view: str) -> list[str]:
        names = self.model.outputs.get(view, {"embedding": view})
        return [teacher_view(name, self.name) for name in names.values()]

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, ViewTensor], skip: Collection[str] = ()) -> dict[str, Tensor]:
        """Embeddings [B, D] (or what else a view gives) by the names in `outputs`, those in `skip` left out.

        An input called VIEW_TEACHER (of another size, or other tokens) is read in place of the view's own.
        """
        found: dict[str, Tensor] = {}
        for view, own in self.views.items():
            if all(name in skip for name in self._outputs(view)):
                continue
            other = teacher_view(view, self.name)
            made = self.model.read(view, own, inputs[other] if other in inputs else inputs[view])
            found |= {teacher_view(name, self.name): value for name, value in made.items()}
        return found

    @torch.no_grad()
    def follow_(self, model: EncoderModel, step: int, total_steps: int) -> None:
        """Move towards `model` after its optimizer step; `step` of `total_steps` counts from 0. Frozen ones stay."""
        if not isinstance(self.config, EmaTeacherConfig):
            return
        average = get_ema_multi_avg_fn(self.config.momentum_at(step, total_steps))
        pairs = [(tower, model.towers[name]) for name, tower in self.model.towers.items()]
        pairs += [(head, model.token_heads[name]) for name, head in self.model.token_heads.items()]
        for slow, followed in pairs:
            # Both are sharded alike, or neither is.
            average([_local(p) for p in slow.parameters()], [_local(p) for p in followed.parameters()], 0)
            for own, theirs in zip(slow.buffers(), followed.buffers(), strict=True):  # statistics of batch norms
                own.copy_(theirs)


def _local(parameter: Tensor) -> Tensor:
    """This worker's shard of a parameter, or all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def build_teachers(
    configs: Mapping[str, AnyTeacherConfig], cfg: ModelConfig, model: EncoderModel
) -> dict[str, Teacher]:
    """The teachers of a run, on the CPU or wherever `model` is (ema).

    Args:
        configs: name -> settings.
        cfg: the model in training.
        model: its towers, which an ema teacher starts as a copy of.

    Raises:
        ClewError: weights that are not there or do not fit.
    """
    return {
        name: _build(name, config, cfg, model)
        for name, config in configs.items()
        if not isinstance(config, StoredTeacherConfig)
    }


def stored_views(
    configs: Mapping[str, AnyTeacherConfig], cfg: ModelConfig, corpora: Sequence[Corpus]
) -> list[StoredView]:
    """What the `stored` teachers give: embeddings that the loader reads with each sample.

    Raises:
        ConfigError: folders that do not fit the corpora, or lack a view.
    """
    return [
        open_stored(teacher_view(view, name), str(cfg.each_view[view].of), config.embeddings, corpora, name)
        for name, config in configs.items()
        if isinstance(config, StoredTeacherConfig)
        for view in _views(config, cfg)
    ]


def _build(name: str, config: EmaTeacherConfig | FrozenTeacherConfig, cfg: ModelConfig, model: EncoderModel) -> Teacher:
    views = _views(config, cfg)
    part = cfg.of_views(views)
    if isinstance(config, EmaTeacherConfig):
        towers = {tower: copy.deepcopy(model.towers[tower]) for tower in part.towers}
        given = {view.tower for view in part.views.values() if "tokens" in view.outputs}
        heads = {tower: copy.deepcopy(model.token_heads[tower]) for tower in given}
        own = EncoderModel(towers, part.readers, part.embed_dim, part.outputs, heads)
        return Teacher(name, config, own, part, {view: view for view in views})
    if config.borrows_towers:
        part = part.model_copy(update={"weights": config.weights})
        own = build_model(part)
        own.outputs = {}
        return Teacher(name, config, own, part, {view: view for view in views})
    own, _, part = load_checkpoint_model(config.weights)
    own.outputs = {}  # its embeddings alone
    return Teacher(name, config, own, part, _own_names(name, config, cfg, part))


def _views(config: AnyTeacherConfig, cfg: ModelConfig) -> Sequence[str]:
    return list(cfg.each_view) if config.views is None else config.views


def _own_names(name: str, config: FrozenTeacherConfig, cfg: ModelConfig, own: ModelConfig) -> dict[str, str]:
    """View of the batch -> the teacher's own view or field that reads it."""
    found = {}
    for view in _views(config, cfg):
        field = str(cfg.each_view[view].of)
        if view not in own.readers and field not in own.readers:
            raise ConfigError(
                f"teachers.{name}: {config.weights} reads neither the view {view!r} nor the field {field!r}; it reads "
                f"{', '.join(own.readers)}."
            )
        found[view] = view if view in own.readers else field
    return found


def with_teachers(inputs: Inputs, configs: Mapping[str, AnyTeacherConfig], cfg: ModelConfig) -> Inputs:
    """The model's inputs, and those of frozen teachers that want other pictures or tokens than the model.

    Such an input is called like the teacher's embedding of the view, and shows what the view shows: it is cropped and
    coloured by the same random numbers.

    Raises:
        ClewError: a teacher whose checkpoint is not there or lacks a view.
    """
    views, fields, draws = dict(inputs.views), dict(inputs.fields), dict(inputs.draws)
    for name, config in configs.items():
        if not isinstance(config, FrozenTeacherConfig):
            continue
        if not storage.exists(config.weights):
            raise ConfigError(f"teachers.{name}: weights {config.weights} do not exist.")
        if config.borrows_towers:
            continue
        with localised(config.weights) as local:
            own_config = checkpoint_config(find_checkpoint(local))
            own_inputs = build_inputs(own_config, train=False)
        for view, own in _own_names(name, config, cfg, own_config).items():
            theirs, ours = own_inputs.views[own], inputs.views[view]
            if theirs.modality != ours.modality:
                raise ConfigError(
                    f"teachers.{name}: {config.weights} reads {theirs.modality} where the view {view!r} is "
                    f"{ours.modality}."
                )
            wanted = replace(theirs, augmentation=ours.augmentation)  # type: ignore[arg-type]
            if not _alike(wanted, ours):
                output = teacher_view(view, name)
                views[output], fields[output], draws[output] = wanted, inputs.field_of(view), view
    return Inputs(views, fields, draws)


def _alike(one: ViewInput, other: ViewInput) -> bool:
    """Whether two inputs make the same of a sample; tokenizers are the same if they are written alike."""
    if isinstance(one, TextInput) and isinstance(other, TextInput):
        mine, theirs = one.tokenizer, other.tokenizer
        if mine.rust.to_str() != theirs.rust.to_str():
            return False
        one = replace(one, tokenizer=replace(mine, rust=theirs.rust))
    return one == other
