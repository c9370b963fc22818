"""A trained model in the formats of other projects: `clew export`."""
