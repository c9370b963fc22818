"""Zero-shot classification: a class is the mean embedding of its name in a few prompt templates.

For class c with prompts p_1..p_T: w_c = normalise(mean_t normalise(f(p_t(c)))); an image belongs to the class with the
largest w_c . f(image). Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
ICML 2021. Classes come from one field of the samples' own metadata; a sample without it is left out
and counted, and a corpus with fewer than two classes is passed over with a note.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from cl.config import Config
from cl.corpus import Kind
from cl.evaluation.items import Embedded, meta_field
from cl.evaluation.ranks import CANDIDATES, TIE
from cl.evaluation.registry import METRICS, Figure, Measured, Metric, share_error

logger = logging.getLogger(__name__)


class ZeroShotOptions(Config):
    """Options of `zero_shot`."""

    label: str = Field(description="field of the sample's JSON metadata that holds its class; a.b reaches inside")
    templates: list[str] = Field(
        ["{}", "a picture of {}", "an icon of {}"], min_length=1, description="prompts; {} becomes the class name"
    )
    names: dict[str, list[str]] = Field({}, description="other words for a class (all are used); default: its label")
    k: list[int] = Field([1, 5], min_length=1, description="the k of top-k; those of at least all classes are left out")

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must hold {{}} exactly once")
        return templates


def class_embeddings(data: Embedded, classes: list[str], options: ZeroShotOptions) -> Tensor:
    """[C, D] one unit vector a class: the mean over templates and names, normalised again."""
    prompts, owner = [], []
    for number, label in enumerate(classes):
        for name in options.names.get(label, [label]):
            prompts += [template.replace("{}", name) for template in options.templates]
            owner += [number] * len(options.templates)
    embedded = data.encode_texts(prompts)
    index = torch.tensor(owner, device=embedded.device)
    sums = torch.zeros(len(classes), embedded.shape[1], device=embedded.device).index_add_(0, index, embedded)
    return F.normalize(sums / torch.bincount(index)[:, None], dim=1)


def label_ranks(images_MD: Tensor, classes_CD: Tensor, label_M: Tensor) -> Tensor:
    """[M] rank of each image's own class, from 1; ties are counted against it."""
    ranks = []
    for start in range(0, len(images_MD), CANDIDATES):
        rows = slice(start, start + CANDIDATES)
        scores = images_MD[rows] @ classes_CD.T
        own = scores.gather(1, label_M[rows, None])
        ranks.append((scores >= own - TIE).sum(dim=1))
    return torch.cat(ranks)


@METRICS.register(
    "zero_shot",
    "zero-shot classification of images with prompt templates: top-k and mean per class",
    paper="Learning Transferable Visual Models From Natural Language Supervision",
)
class ZeroShot(Metric[ZeroShotOptions]):
    """Top-k accuracy, and top-1 averaged over classes; chance is a guess among all classes."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"image-text"})
    default: ClassVar[bool] = False  # it needs to know the field of the labels
    Options = ZeroShotOptions

    def measure(self, data: Embedded) -> Measured:
        labels = meta_field(data, self.options.label)
        # One vote for each distinct image and label, as in retrieval.
        votes = sorted({(int(i), c) for i, c in zip(data.views["image"].of_sample, labels, strict=True) if c})
        classes = sorted({label for _, label in votes})
        if len(classes) < 2:
            found = f"only the class {classes[0]!r}" if classes else "no class"
            reason = f"the metadata field {self.options.label!r} of {data.samples} samples holds {found}"
            logger.warning("zero_shot is not measured: %s.", reason)
            return Measured(notes={"not_measured": reason})
        number = {label: place for place, label in enumerate(classes)}
        weights = class_embeddings(data, classes, self.options)
        image = torch.tensor([i for i, _ in votes], device=weights.device)
        label = torch.tensor([number[c] for _, c in votes], device=weights.device)
        ranks = label_ranks(data.views["image"].embeddings[image], weights, label).cpu().numpy()

        measured = Measured()
        for k in (k for k in self.options.k if k < len(classes)):
            share = float(np.mean(ranks <= k))
            measured.figures.append(
                self._figure(
                    f"top-{k}", share, k / len(classes), len(votes), len(classes), share_error(share, len(votes))
                )
            )
        hits = np.bincount(label.cpu().numpy(), weights=ranks <= 1, minlength=len(classes))
        sizes = np.bincount(label.cpu().numpy(), minlength=len(classes))
        mean = float(np.mean(hits / sizes))
        measured.figures.append(self._figure("mean_per_class", mean, 1 / len(classes), len(votes), len(classes), None))
        measured.notes = {
            "classes": [
                {"class": name, "images": int(size), "top_1": float(right / size)}
                for name, size, right in zip(classes, sizes, hits, strict=True)
            ],
            "largest_class_share": float(sizes.max() / sizes.sum()),  # what always guessing it would score as top-1
            "without_label": sum(c is None for c in labels),
        }
        return measured

    def _figure(
        self, name: str, value: float, chance: float, queries: int, classes: int, stderr: float | None
    ) -> Figure:
        return Figure(
            metric=f"zero_shot/{self.options.label}/{name}",
            value=value,
            chance=chance,
            higher_is_better=True,
            stderr=stderr,
            queries=queries,
            candidates=classes,
        )
