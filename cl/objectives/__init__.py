"""Objectives: what a batch is taught, one idea a file, each with its formula and its paper."""

from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES, Objective, ObjectiveConfig, build_objective

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig", "Outcome", "build_objective"]
