"""Models that find text in pictures: one a file, registered by name in `pipelines.detectors.registry`."""
