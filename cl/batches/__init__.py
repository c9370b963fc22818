"""Batches: from a corpus on disk to the tensors of each training step.

A plan says which samples a step holds, whatever the number of workers: `BatchPlan` as they lie in the corpora,
`MixedPlan` in shares of their parts, `ArrangedPlan` dealt out among steps by what they are. `Loader` reads, decodes and
tokenises a worker's part of them ahead of the training loop.
"""
