"""Objectives whose targets are numbers: how alike two samples are, how relevant a candidate is, which comes first."""
