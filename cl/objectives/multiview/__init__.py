"""Objectives for more than two views of a sample, for token-wise views and for bags."""
