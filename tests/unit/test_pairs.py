"""The batch contract refuses what does not belong together, by name."""

from __future__ import annotations

import pytest
import torch

from cl.errors import DataError
from cl.pairs import Pairs

A, B = torch.zeros(3, 4), torch.ones(3, 4)


def test_length_weights_and_content() -> None:
    pairs = Pairs({"image": A, "text": B}, content=torch.arange(3))
    assert len(pairs) == 3
    assert pairs.weights(torch.float64).tolist() == [1, 1, 1]
    content = pairs.content_columns()
    assert content is not None
    assert content.shape == (3, 1)
    assert Pairs({"image": A}).content_columns() is None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"views": {}}, "at least one view"),
        ({"views": {"image": A, "text": B[:2]}}, "View 'text' has 2 samples, but view 'image' has 3"),
        ({"views": {"image": A[0]}}, r"View 'image' has shape \[4\]"),
        ({"views": {"image": A}, "ids": torch.zeros(3)}, r"Field 'ids' has shape \[3\]"),
        ({"views": {"image": A}, "weight": torch.zeros(2)}, r"Field 'weight' has shape \[2\]"),
    ],
)
def test_refusals(fields: dict, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        Pairs(**fields)


def test_missing_view_names_those_there() -> None:
    with pytest.raises(DataError, match="no view 'audio'; it has image, text"):
        Pairs({"image": A, "text": B}).view("audio")
