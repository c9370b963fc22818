"""Training: one loop that runs the same under Ray Train, under torchrun, or in a process alone.

`cl.training.run.train` is what `clew train` calls; `cl.training.loop.train_worker` is what every worker runs.
"""
