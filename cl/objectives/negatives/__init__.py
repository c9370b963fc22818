"""Objectives that choose, weigh, mix or make negatives."""
