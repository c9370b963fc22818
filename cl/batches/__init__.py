"""Batches: from a corpus on disk to the tensors of each training step.

`BatchPlan` says which samples a step holds, whatever the number of workers; `Loader` reads, decodes and tokenises
a worker's part of them ahead of the training loop.
"""
