"""Objectives that are local to a sample: what is learnt beside the comparison of samples."""
