"""Parts of a text in place of the text.

Izacard et al. 2022, "Unsupervised Dense Information Retrieval with Contrastive Learning", section 3.2: independent
spans of the same document, and words left out.
"""

from __future__ import annotations

from cl.views.augmentation import AUGMENTATIONS
from cl.views.texts import TextAugmentation

PAPER = "Unsupervised Dense Information Retrieval with Contrastive Learning"

AUGMENTATIONS.register("span", "a span of 5 to 50 % of the words", PAPER)(
    TextAugmentation(name="span", span=(0.05, 0.5))
)
AUGMENTATIONS.register("delete-words", "each word is left out with probability 0.1", PAPER)(
    TextAugmentation(name="delete-words", delete=0.1)
)
