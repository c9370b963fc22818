"""Objectives on prototypes, clusters and neighbours."""
