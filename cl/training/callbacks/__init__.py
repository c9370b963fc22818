"""Callbacks: what else happens while a run trains.

A callback is named in the config (`callbacks: [{name: stop_at_loss, loss: 0.5}]`) and lives in every worker. A package
adds its own through the entry-point group `clew.callbacks`.
"""

from cl.training.callbacks.base import CALLBACKS, Callback, Progress, build_callbacks

__all__ = ["CALLBACKS", "Callback", "Progress", "build_callbacks"]
