"""Augmentations by name, with the values of their papers."""
