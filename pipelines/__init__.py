"""Data pipelines on Ray Data: from raw shards to curated corpora and their reports."""
