"""Sweeps: the training function under Ray Tune, over temperatures, batch sizes and every other field.

config.py   what a sweep is: a training config, a space, a budget, a metric on validation corpora
space.py    which settings are tried
trial.py    one trial: train, score at fixed shares of the budget, go on where it was
run.py      `sweep(cfg)`: all trials through Ray Tune
result.py   what sweep.json holds
"""
