"""Arrangements: how the samples of several steps are dealt out among these steps, by what they are."""

from cl.batches.arrangements.base import ARRANGEMENTS, ArrangeConfig, Arrangement, build_arrangement

__all__ = ["ARRANGEMENTS", "ArrangeConfig", "Arrangement", "build_arrangement"]
