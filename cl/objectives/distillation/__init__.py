"""Objectives that bring the knowledge of a teacher into the student."""
