"""Evaluation: how good a checkpoint's embeddings are, with the chance level beside every figure.

run.py         `evaluate(cfg)`: corpora in, eval.json out
items.py       the distinct things of a corpus and which belong together
embed.py       everything of a corpus embedded once; all metrics share it
ranks.py       exact ranks in chunks: memory does not grow with queries x candidates
chance.py      what a ranking in random order would score, exactly
metrics/       one file a metric family, registered in `METRICS`
"""
