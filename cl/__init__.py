"""Clew: contrastive learning at web scale.

`cl` holds what a model learns and how: objectives, the engine that evaluates them over all workers,
encoders, batches, training, evaluation and sweeps. `pipelines` turns raw shards into the corpora that
`cl` reads. Sub-modules are imported on demand, because torch and Ray take seconds to load.
"""

__version__ = "0.1.0"
