"""Objectives that learn from labels, or from several positives of a sample."""
