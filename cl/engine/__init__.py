"""The engine: evaluates objectives over all workers, tile by tile, with exact gradients.

It needs torch alone: nothing here imports Ray, so the objectives work in anybody's DDP loop.
"""
