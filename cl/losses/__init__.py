"""Drop-in losses: the signatures of open_clip and sentence-transformers, computed by Clew's engine.

    - from open_clip.loss import ClipLoss
    + from cl.losses import ClipLoss

Memory is linear in the batch, gradients are exact whatever the number of workers, and the value is that of the global
batch on every worker.
"""

from cl.losses.cached_text_pairs import CachedMultipleNegativesRankingLoss
from cl.losses.image_text import ClipLoss, SigLipLoss
from cl.losses.text_pairs import MultipleNegativesRankingLoss

__all__ = ["CachedMultipleNegativesRankingLoss", "ClipLoss", "MultipleNegativesRankingLoss", "SigLipLoss"]
