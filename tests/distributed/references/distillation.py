"""References of the objectives that learn from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, huber_loss

from tests.distributed.references.batch import Batch, Reference


def similarity_distillation(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """CLIP-KD: KL of the teacher's softmax over candidates to the student's, each way."""
    keep = ~batch.excluded
    student = parameters["temperature.log_scale"].exp() * batch.views["a"] @ batch.views["b"].T
    teacher = batch.views["a_teacher"] @ batch.views["b_teacher"].T / settings.get("teacher_temperature", 0.07)

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        log_q = student.masked_fill(~keep, -torch.inf).log_softmax(1)
        log_p = teacher.masked_fill(~keep, -torch.inf).log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).where(keep, 0).sum(1)

    forward = divergence(student, teacher)
    if settings.get("direction") == "forward":
        return batch.mean(forward)
    return batch.mean((forward + divergence(student.T, teacher.T)) / 2)


class Past:
    """The teacher's embeddings of the last `size` valid samples, newest last, with their content."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.embeddings = torch.zeros(0, 6, dtype=torch.float64)
        self.content = torch.zeros(0, dtype=torch.int64)

    def push(self, batch: Batch, view: str) -> None:
        alive = batch.weight > 0
        self.embeddings = torch.cat([self.embeddings, batch.views[view][alive]])[-self.size :]
        self.content = torch.cat([self.content, batch.content[alive]])[-self.size :]


def seed(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Fang et al. 2021, with the teacher's whole batch beside its queue."""
    past = batch.memory.setdefault("past", Past(settings["queue"]))
    alive = batch.weight > 0
    candidates = torch.cat([batch.views["a_teacher"][alive], past.embeddings])
    target = (batch.views["a_teacher"] @ candidates.T / settings["teacher_temperature"]).softmax(1)
    logits = parameters["temperature.log_scale"].exp() * batch.views["a"] @ candidates.T
    past.push(batch, "a_teacher")
    return batch.mean(-(target * logits.log_softmax(1)).sum(1))


def embedding_regression(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    targets = settings.get("targets", {"a": "a_teacher"})
    losses = []
    for mine, theirs in targets.items():
        x, y = batch.views[mine], batch.views[theirs]
        kind = settings.get("distance", "squared")
        if kind == "squared":
            losses.append(((x - y) ** 2).sum(1))
        elif kind == "cosine":
            losses.append(1 - cosine_similarity(x, y))
        else:
            beta = settings["beta"]
            losses.append((huber_loss(x, y, reduction="none", delta=beta) / beta).sum(1))
    return batch.mean(torch.stack(losses).mean(0))


def contrastive_distillation(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of finding one's own teacher embedding among the batch's, and among a queue's."""
    scale = parameters["temperature.log_scale"].exp()
    targets = settings.get("targets", {"a": "a_teacher"})
    past = batch.memory.setdefault("past", Past(settings.get("queue", 0) or 1))
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs in targets.items():
        scores = scale * batch.views[mine] @ batch.views[theirs].T
        candidates = scores.masked_fill(batch.excluded, -torch.inf)
        if settings.get("queue"):
            old = scale * batch.views[mine] @ past.embeddings.T
            old = old.masked_fill(batch.content[:, None] == past.content, -torch.inf)
            candidates = torch.cat([candidates, old], 1)
            past.push(batch, theirs)
        total = total + batch.mean(candidates.logsumexp(1) - scores.diagonal()) / len(targets)
    return total


def concept_distillation(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """DiHT; CatLIP's binary cross-entropy."""
    logits = 20 * batch.views["a"] @ parameters["classify.weight"].T + parameters["classify.bias"]
    tags = batch.labels["tags"]
    if settings.get("form") == "binary":
        losses = -(tags * logits.sigmoid().log() + (1 - tags) * (1 - logits.sigmoid()).log()).mean(1)
        return batch.mean(losses)
    some = tags.sum(1) > 0
    chance = logits.exp() / logits.exp().sum(1, keepdim=True)
    target = tags / tags.sum(1, keepdim=True).where(some[:, None], 1)
    return batch.mean(-(target * chance.log()).sum(1), some)


def similarity_preserving(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Tung and Mori 2019, over pairs of different samples."""
    out = batch.masked | batch.own
    total = torch.zeros((), dtype=torch.float64)
    targets = settings.get("targets", {"a": "a_teacher"})
    for mine, theirs in targets.items():
        x, y = batch.views[mine], batch.views[theirs]
        gap = ((x @ x.T - y @ y.T) ** 2).masked_fill(out, 0).sum(1)
        total = total + batch.mean(gap / (~out).sum(1).clamp_min(1)) / len(targets)
    return total


ALL = ("a", "b", "a_teacher", "b_teacher")
BOTH = {"a": "a_teacher", "b": "b_teacher"}
REFERENCES: dict[str, Reference] = {
    "similarity-distillation": Reference(
        similarity_distillation, [{"teacher_temperature": 0.2}, {"direction": "forward"}], views=ALL
    ),
    "seed": Reference(
        seed, [{"queue": 11, "teacher_temperature": 0.1, "learn_temperature": True}], views=("a", "a_teacher")
    ),
    "embedding-regression": Reference(
        embedding_regression,
        [{}, {"targets": BOTH, "distance": "cosine"}, {"distance": "smooth_l1", "beta": 0.4}],
        views=ALL,
    ),
    "contrastive-distillation": Reference(
        contrastive_distillation, [{"targets": BOTH}, {"queue": 11, "temperature": 0.2}], views=ALL
    ),
    "concept-distillation": Reference(
        concept_distillation, [{"concepts": 4}, {"concepts": 4, "form": "binary"}], views=("a",)
    ),
    "similarity-preserving": Reference(similarity_preserving, [{}, {"targets": BOTH}], views=ALL),
}
