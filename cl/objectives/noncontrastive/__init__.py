"""Objectives of moments and of predictions: no negatives."""
