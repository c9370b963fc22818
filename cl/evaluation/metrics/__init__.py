"""The metric families; each module registers its own in `cl.evaluation.registry.METRICS`."""
