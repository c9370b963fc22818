"""How pipelines run Ray Data: silent, and strict about errors."""

from __future__ import annotations

import logging


def prepare_ray_data() -> None:
    """Set this process's Ray Data context; call it after Ray has started and before a data set is made.

    Ray Data's own bars and console messages are off, as we show progress ourselves and an error reaches the user once,
    as the exception that ends the run; its log file keeps everything. No failed block is ever dropped: rows that cannot
    be used are quarantined one by one where they are read.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)
