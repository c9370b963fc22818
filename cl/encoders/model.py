"""The model: named towers, and for each view of a sample the tower that reads it.

    model = build_model(cfg, seed=0)
    model({"image": uint8 [B, 3, H, W], "text": int64 [B, L]})  ->  {"image": [B, D], "text": [B, D]}

The embeddings are L2-normalised in float32 (float64 stays float64) whatever the precision of the towers. A view whose
config asks for more than its embedding gives that too (`cl.encoders.outputs`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from cl.encoders.config import ModelConfig, ViewConfig
from cl.encoders.inputs import Inputs, ViewInput
from cl.encoders.outputs import TowerOutputs
from cl.encoders.registry import TOWERS
from cl.engine.normalise import unit
from cl.errors import ConfigError
from cl.pairs import Clock

ViewTensor = Tensor | dict[str, Tensor]


class EncoderModel(nn.Module):
    """Towers by name and the views they read.

    Args:
        towers: name -> tower.
        views: view or field name -> tower name.
        embed_dim: dimensions of the shared space.
        outputs: view -> kind -> name of what the view gives (`ModelConfig.outputs`); default: its embedding.
        token_heads: tower -> what maps its tokens to `embed_dim`, of towers whose tokens a view gives.
    """

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        views: Mapping[str, str],
        embed_dim: int,
        outputs: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
        token_heads: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)
        self.views = dict(views)
        self.embed_dim = embed_dim
        self.outputs = {view: dict(kinds) for view, kinds in outputs.items()}
        self.token_heads = nn.ModuleDict(token_heads)

    def encode(self, view: str, inputs: ViewTensor) -> Tensor:
        """Normalised embeddings [B, embed_dim] of one view."""
        return unit(self.towers[self._tower(view)](inputs))

    def forward(self, inputs: Mapping[str, ViewTensor]) -> dict[str, Tensor]:
        """What each view given gives, by the names of its outputs."""
        found: dict[str, Tensor] = {}
        for view, each in inputs.items():
            found |= self.read(view, view, each)
        return found

    def read(self, view: str, reader: str, inputs: ViewTensor) -> dict[str, Tensor]:
        """The outputs of `view`, whose `inputs` go through the tower of the view or field `reader`."""
        names = self.outputs.get(view, {"embedding": view})
        if list(names) == ["embedding"]:
            return {names["embedding"]: self.encode(reader, inputs)}
        tower = self._tower(reader)
        made: TowerOutputs = self.towers[tower](inputs, whole=True)
        found = {}
        if "embedding" in names:
            found[names["embedding"]] = unit(made.embedding)
        if "features" in names:
            assert made.features is not None  # refused when the model was built
            found[names["features"]] = made.features if made.features.dtype == torch.float64 else made.features.float()
        if "tokens" in names:
            found[names["tokens"]] = unit(self.token_heads[tower](made.tokens))
        return found

    def words(self, inputs: Mapping[str, ViewTensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each view that gives the tokens of a text: token ids int64 [B, T] and which are real, bool [B, T]."""
        found = {}
        for view, each in inputs.items():
            name = self.outputs.get(view, {}).get("tokens")
            tower = self.towers[self._tower(view)] if name else None
            if name and hasattr(tower, "words"):
                found[name] = tower.words(each)  # type: ignore[union-attr, operator]
        return found

    def follow_(self, clock: Clock) -> None:
        """Let towers take what changes over a run, such as their share of dropped patches; before each step."""
        for tower in self.towers.values():
            if hasattr(tower, "follow_"):
                tower.follow_(clock)  # type: ignore[operator]

    def _tower(self, view: str) -> str:
        if view not in self.views:
            raise ConfigError(f"The model has no view {view!r}; it has {', '.join(self.views)}.")
        return self.views[view]


def build_model(cfg: ModelConfig, seed: int = 0) -> EncoderModel:
    """A model on the CPU in float32; the same seed gives the same weights on every rank and machine.

    Each tower draws from its own stream, so adding one does not change the others.

    Raises:
        ConfigError: a tower that cannot be built, or weights that do not fit.
    """
    model = _fresh_model(cfg, seed)
    if cfg.weights is not None:
        from cl.encoders.weights import load_weights

        load_weights(model, cfg.weights)
    return model


def _fresh_model(cfg: ModelConfig, seed: int) -> EncoderModel:
    towers: dict[str, nn.Module] = {}
    token_heads: dict[str, nn.Module] = {}
    for name, tower in cfg.towers.items():
        digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest) >> 1)
            towers[name] = TOWERS[tower.family].build(tower, cfg.embed_dim)
            if any("tokens" in view.outputs for view in cfg.each_view.values() if view.tower == name):
                width = getattr(towers[name], "token_width", None)
                if width is None:
                    raise ConfigError(f"The tower {name!r} gives no tokens, which a view names among its outputs.")
                token_heads[name] = nn.Linear(width, cfg.embed_dim, bias=False)
    for name, view in cfg.each_view.items():
        if "features" in view.outputs and not getattr(towers[view.tower], "has_features", False):
            raise ConfigError(f"The tower {view.tower!r} gives no features, which the view {name!r} has as an output.")
    return EncoderModel(towers, cfg.readers, cfg.embed_dim, cfg.outputs, token_heads)


def check_model(cfg: ModelConfig) -> None:
    """Build the model without memory for its weights: finds every error of its config before a run starts.

    Raises:
        ConfigError: naming the tower or the view that cannot be used.
    """
    towers = {
        name: tower.model_copy(update={"pretrained": False}) if "pretrained" in type(tower).model_fields else tower
        for name, tower in cfg.towers.items()
    }
    inputs = build_inputs(cfg, train=True)
    with torch.device("meta"):
        model = _fresh_model(cfg.model_copy(update={"towers": towers}), 0).eval()
        for name, view in cfg.each_view.items():
            if view.size is None:
                continue
            side = inputs.image(name).size
            try:
                model.encode(name, torch.zeros(1, 3, side, side, dtype=torch.uint8))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"The tower {view.tower!r} cannot read the view {name!r}, whose pictures are {side} pixels wide: "
                    f"{' '.join(str(error).split())[:200]}"
                ) from error


def build_inputs(cfg: ModelConfig, train: bool) -> Inputs:
    """What turns raw samples into the model's input.

    Args:
        cfg: the model.
        train: with the augmentations of the views; without, there is a view for each field as well, named like it.

    Raises:
        ConfigError: a view that its tower cannot read so.
    """
    made = {name: TOWERS[tower.family].inputs(tower, train) for name, tower in cfg.towers.items()}
    fields = {name: str(view.of) for name, view in cfg.each_view.items()}
    views = {} if train else {name: made[cfg.readers[name]] for name in fields.values()}
    views |= {name: _view_input(name, view, made[view.tower], train) for name, view in cfg.each_view.items()}
    return Inputs(views, fields)


def _view_input(name: str, view: ViewConfig, tower: ViewInput, train: bool) -> ViewInput:
    """The tower's own input with the view's size and augmentation."""
    changes: dict[str, object] = {}
    if view.size is not None:
        if tower.modality != "image":
            raise ConfigError(f"The view {name!r} has a size, but its tower {view.tower!r} reads {tower.modality}.")
        changes["size"] = view.size
    if view.augment is not None:
        if view.augment.modality != tower.modality:
            raise ConfigError(
                f"The view {name!r} has the augmentation {view.augment.name!r}, which is for {view.augment.modality}, "
                f"but its tower {view.tower!r} reads {tower.modality}."
            )
        changes["augmentation"] = view.augment if train else None
    return replace(tower, **changes)  # type: ignore[arg-type]
