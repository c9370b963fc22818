"""State that outlives a step and belongs to an objective: queues of earlier embeddings."""
