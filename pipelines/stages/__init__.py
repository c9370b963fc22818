"""What curation can do to a corpus: one stage a file, each registered by name in `pipelines.stages.registry.STAGES`."""
