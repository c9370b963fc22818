"""Concept distillation: linear classifiers on the picture's embedding predict concepts that a teacher has found.

    L = mean_i - sum_c p_ic log softmax(s W e_i + b)_c,   p_i = tags_i / sum tags_i     (softmax)
    L = mean_i 1/C sum_c BCE(sigmoid(s W e_i + b)_c, tags_ic)                           (binary)

Radenovic et al. 2023, "Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training"
(softmax cross-entropy to the teacher's predicted objects and attributes); the binary form is CatLIP's (Mehta et al.
2024, "CatLIP: CLIP-level Visual Recognition Accuracy with 2.7x Faster Pre-training on Web-scale Image-Text Data"),
whose concepts are the WordNet nouns of the caption. A sample without tags has no softmax loss.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cl.config import Config
from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES, Objective
from cl.pairs import Pairs


class ConceptsConfig(Config):
    view: str = Field("a", description="the view that is classified")
    label: str = Field("tags", description="the label of the batch with a column for each concept, from 0 to 1")
    concepts: int = Field(ge=1, description="C, number of concepts")
    form: Literal["softmax", "binary"] = Field("softmax", description="one distribution, or a choice for each concept")
    scale: float = Field(20.0, gt=0, description="s, factor of the embeddings, which have length 1")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


@OBJECTIVES.register(
    "concept-distillation",
    "linear classifiers on an embedding predict concepts (DiHT, CatLIP)",
    paper="Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training",
)
class ConceptDistillation(Objective):
    """See the module's formula. Parameters: W and b."""

    Config = ConceptsConfig
    compares = "one view with labels"
    needs = ("tags",)
    memory = "batch x concepts"

    def __init__(self, config: ConceptsConfig) -> None:
        super().__init__()
        assert config.dimensions is not None
        self.config = config
        self.classify = nn.Linear(config.dimensions, config.concepts)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        tags = pairs.label(self.config.label).to(pairs.dtype)
        weight = pairs.view_weights(self.config.view)
        rows = pairs.view(self.config.view).to(pairs.dtype).where((weight > 0)[:, None], 0)
        logits = self.classify(self.config.scale * rows)
        if self.config.form == "binary":
            loss = binary_cross_entropy_with_logits(logits, tags, reduction="none").mean(1)
        else:
            count = tags.sum(1, keepdim=True)
            weight = weight * (count[:, 0] > 0)
            loss = -(tags / count.clamp_min(1e-12) * logits.log_softmax(1)).sum(1)
        return Outcome(moments.replicated(moments.mean(loss[:, None], weight, workers)[0], workers))
