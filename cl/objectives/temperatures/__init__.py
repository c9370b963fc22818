"""Objectives whose temperature is more than one number."""
