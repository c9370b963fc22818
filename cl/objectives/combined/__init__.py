"""Objectives made of objectives."""
