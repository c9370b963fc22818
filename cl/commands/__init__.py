"""The commands of `clew`, by what they are for; `cl.cli` puts them together."""
