"""References of the objectives that are local to a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from tests.distributed.references.batch import Batch, Reference


def linear(rows: Tensor, parameters: Mapping[str, Tensor], name: str) -> Tensor:
    return rows @ parameters[f"{name}.weight"].T + parameters.get(f"{name}.bias", 0)


def layer_norm(rows: Tensor, parameters: Mapping[str, Tensor], name: str) -> Tensor:
    centred = rows - rows.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normal * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


def attention(states: Tensor, memory: Tensor, parameters: Mapping[str, Tensor], name: str, heads: int) -> Tensor:
    """One sample's states [T, W] to its memory [S, W]; where both are the same, to what is not later."""
    query = linear(states, parameters, f"{name}.query")
    key, value = (linear(memory, parameters, f"{name}.{part}") for part in ("key", "value"))
    width = query.shape[1] // heads
    found = []
    for start in range(0, query.shape[1], width):
        part = slice(start, start + width)
        scores = query[:, part] @ key[:, part].T / width**0.5
        if states is memory:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        found.append(scores.softmax(1) @ value[:, part])
    return linear(torch.cat(found, 1), parameters, f"{name}.out")


def captioning(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Yu et al. 2022, eq. 3, one sample and one word at a time; the mean over all predicted words."""
    total, words = torch.zeros((), dtype=torch.float64), 0.0
    for i, weight in enumerate(batch.weight.tolist()):
        ids, length = batch.token_ids["b_tokens"][i], int(batch.tokens["b_tokens"][i].sum())
        picture = linear(batch.views["a_tokens"][i], parameters, "decoder.read_picture")
        picture = layer_norm(picture, parameters, "decoder.norms.0")
        states = linear(batch.views["b_tokens"][i], parameters, "decoder.read_words")
        states = layer_norm(states, parameters, "decoder.norms.1")
        for number in range(settings["layers"]):
            name = f"decoder.layers.{number}"
            seen = layer_norm(states, parameters, f"{name}.norms.0")
            states = states + attention(seen, seen, parameters, f"{name}.words", settings["heads"])
            seen = layer_norm(states, parameters, f"{name}.norms.1")
            states = states + attention(seen, picture, parameters, f"{name}.picture", settings["heads"])
            hidden = gelu(linear(layer_norm(states, parameters, f"{name}.norms.2"), parameters, f"{name}.mlp.0"))
            states = states + linear(hidden, parameters, f"{name}.mlp.2")
        scores = linear(layer_norm(states, parameters, "decoder.norms.2"), parameters, "decoder.vocabulary")
        for place in range(1, length):
            total = total - weight * scores[place - 1].log_softmax(0)[ids[place]]
            words += weight
    return total / (words or 1.0)


SETTINGS = {"views": ["a_tokens", "b_tokens"], "vocabulary": 7, "layers": 1, "heads": 2}
REFERENCES: dict[str, Reference] = {
    "captioning": Reference(
        captioning,
        [{**SETTINGS, "rows": 2}, {**SETTINGS, "layers": 2, "heads": 4, "width": 8}],
        views=("a_tokens", "b_tokens"),
    ),
}
