"""Registered objectives train: 200 steps on the shipped emoji, by one shared config, beat the untrained state.

Beaten is retrieval of held-out drawings by their captions (recall at 10, by a factor of 3) or, for objectives that do
not bring pictures and captions together, the classification of pictures by their nearest neighbours (error, by 8 %);
for those that follow a teacher, agreement with its neighbours (by a factor of 2).
An objective whose score is the product of three modalities is asked with that score.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from cl.pairs import Clock, Extra, Pairs
from tests.distributed.references import REFERENCES
from tests.emoji import SIDE, TAGS, WORDS, Emoji, read_emoji

DIMENSIONS, STEPS, BATCH, RATE, MOMENTUM = 32, 200, 128, 2e-3, 0.98
PIXELS = 3 * SIDE * SIDE


class Towers(nn.Module):
    """A picture and a caption tower, two layers each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.picture, self.caption = (
            nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, DIMENSIONS))
            for width in (PIXELS, WORDS)
        )

    def encode(self, tower: str, features: Tensor) -> Tensor:
        return normalize(getattr(self, tower)(features), dim=-1)


@cache
def training_set() -> Emoji:
    return read_emoji("train/emoji-google-00000.tar")


@cache
def held_out() -> Emoji:
    return read_emoji("heldout/unseen-drawings/emoji-twitter-00000.tar")


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to two pixels, brighter or darker."""
    rolled = pictures.view(-1, 3, SIDE, SIDE)
    shifts = torch.randint(-2, 3, (2,), generator=generator).tolist()
    rolled = rolled.roll(shifts, (2, 3)) * (0.8 + 0.4 * torch.rand(len(pictures), 1, 1, 1, generator=generator))
    return rolled.flatten(1)


def batch_of(name: str, step: int, towers: Towers, teacher: Towers) -> Pairs:
    """A batch with whatever the objective reads, as its reference says."""
    data, reference = training_set(), REFERENCES[name]
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randperm(len(data), generator=generator)[:BATCH]
    group = data.group[chosen]
    pictures, captions = augmented(data.pictures[chosen], generator), data.captions[chosen]
    score = pictures.mean(1)
    if "scored pairs" in OBJECTIVES[name].needs:  # every second caption is another sample's
        given = captions.where((torch.arange(BATCH) % 2 == 0)[:, None], captions.roll(1, 0))
        score = torch.cosine_similarity(captions, given)
        captions = given
    quarters = pictures.view(-1, 3, 2, SIDE // 2, 2, SIDE // 2)
    patches = torch.zeros(BATCH, 4, 3, SIDE, SIDE)  # each quarter of the picture alone is a token
    for i in range(4):
        row, column = (i // 2) * (SIDE // 2), (i % 2) * (SIDE // 2)
        patches[:, i, :, row : row + SIDE // 2, column : column + SIDE // 2] = quarters[:, :, i // 2, :, i % 2]
    views = {
        "a": lambda: towers.encode("picture", pictures),
        "b": lambda: towers.encode("caption", captions),
        "c": lambda: towers.encode("picture", augmented(data.pictures[chosen], generator)),
        "a_teacher": lambda: teacher.encode("picture", pictures).detach(),
        "b_teacher": lambda: teacher.encode("caption", captions).detach(),
        "a_tokens": lambda: towers.encode("picture", patches.flatten(2)),
        "b_tokens": lambda: towers.encode("caption", data.words[chosen]),
    }
    extra = {}
    if "negatives" in reference.extra:  # a caption of the same group
        same = (data.group[None] == group[:, None]).float()
        mined = same.multinomial(1, generator=generator)[:, 0]
        unrelated = mined != chosen
        rows = torch.arange(BATCH)[unrelated]
        content = mined[unrelated, None]
        extra["negatives"] = Extra(
            towers.encode("caption", data.captions[mined[unrelated]]), rows, "negative", content=content
        )
    if "positives" in reference.extra:
        extra["positives"] = Extra(towers.encode("caption", data.keywords[chosen]), torch.arange(BATCH), "positive")
    alike = data.captions[chosen] @ data.captions[chosen].T
    return Pairs(
        {view: views[view]() for view in reference.views},
        ids=torch.stack([chosen, torch.zeros_like(chosen)], 1),
        content=chosen,
        labels={
            "class": group,
            "levels": torch.stack([group, chosen], 1),
            "tags": data.tags[chosen],
            "score": score,
            "vector": pictures.view(BATCH, 3, -1).mean(2),
            "source": chosen % 2,
            "cluster": group,
            "time": torch.tensor([1, 2]).expand(BATCH, 2),  # the second view lies between the first and the third
        },
        present={"c": torch.rand(BATCH, generator=generator) < 0.8} if reference.missing else {},
        tokens={"b_tokens": data.word_mask[chosen]} if "b_tokens" in reference.views else {},
        extra=extra,
        targets={"soft": (10 * alike).softmax(1)},
        clock=Clock(step, STEPS, step * BATCH // len(data), STEPS * BATCH // len(data) + 1),
    )


def train(name: str, settings: dict[str, Any], teacher: Towers | None = None) -> Towers:
    """The shared config: AdamW at one rate; without a `teacher`, the teacher is a moving average of the towers."""
    torch.manual_seed(0)
    towers = Towers()
    objective = build_objective(ObjectiveConfig.model_validate({"name": name, **settings}), DIMENSIONS)
    moving = teacher or Towers()
    optimizer = torch.optim.AdamW([*towers.parameters(), *objective.parameters()], lr=RATE)
    for step in range(STEPS):
        loss = objective(batch_of(name, step, towers, moving), Workers()).loss
        assert loss.isfinite(), f"loss is {loss} at step {step}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.clamp_()
        if teacher is None:
            with torch.no_grad():
                for slow, fast in zip(moving.parameters(), towers.parameters(), strict=True):
                    slow.lerp_(fast, 1 - MOMENTUM)
    return towers


@torch.no_grad()
def recall_at_10(towers: Towers, powers: int = 1) -> float:
    """Held-out drawings found by their captions among 500; chance is 0.02. `powers`: the picture stands for so many
    modalities, each a factor of the score.
    """
    data = held_out()
    scores = towers.encode("caption", data.captions) @ towers.encode("picture", data.pictures).pow(powers).T
    return float(
        (scores.argsort(1, descending=True)[:, :10] == torch.arange(len(data))[:, None]).any(1).double().mean()
    )


@torch.no_grad()
def neighbour_error(towers: Towers) -> float:
    """Held-out drawings whose group is not that of most of their five nearest training drawings."""
    known, asked = training_set(), held_out()
    scores = towers.encode("picture", asked.pictures) @ towers.encode("picture", known.pictures).T
    votes = known.group[scores.topk(5, 1).indices].mode(1).values
    return float((votes != asked.group).double().mean())


@cache
def untrained() -> tuple[float, float]:
    return recall_at_10(Towers()), neighbour_error(Towers())


@cache
def good_teacher() -> Towers:
    return train("infonce", {})


@torch.no_grad()
def agreement(towers: Towers, teacher: Towers) -> float:
    """How many of the ten held-out drawings nearest to one of them are the teacher's ten nearest as well."""

    def nearest(model: Towers) -> Tensor:
        embeddings = model.encode("picture", held_out().pictures)
        return (embeddings @ embeddings.T).fill_diagonal_(-2).topk(10, 1).indices

    return float((nearest(towers)[:, :, None] == nearest(teacher)[:, None]).any(2).double().mean())


# Exact by their references, but settings with which they beat these bounds in 200 steps have not been found yet.
UNPROVEN = {
    *("w-mse", "whitened", "simsiam", "byol", "dino", "distance-correlation"),
    *("swav", "nnclr", "prototypical"),
    "captioning",  # predicts words, which tests/unit/test_recipes.py sees it learn
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in REFERENCES if name not in UNPROVEN])
def test_objective_trains(name: str) -> None:
    distils = OBJECTIVES[name].__module__.startswith("cl.objectives.distillation")
    settings = dict(REFERENCES[name].settings[0])
    if "concepts" in settings:
        settings["concepts"] = TAGS
    towers = train(name, settings, good_teacher() if distils else None)
    recall, error = untrained()
    powers = 2 if name == "symile" else 1
    found = recall_at_10(towers, powers) >= 3 * max(recall, 0.02) or neighbour_error(towers) <= 0.92 * error
    assert found or (distils and agreement(towers, good_teacher()) >= 2 * agreement(Towers(), good_teacher()))


def test_the_sample_has_what_the_objectives_ask_for() -> None:
    data = training_set()
    assert len(data) > 1700
    assert data.group.unique().tolist() == list(range(9))
    assert data.tags.shape == (len(data), TAGS)
    assert (data.tags.sum(0) > 10).all()
