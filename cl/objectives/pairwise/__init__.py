"""Objectives of pairs: the own pair against all others, one idea a file."""
