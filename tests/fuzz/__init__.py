"""Fuzzing of every parser of outside bytes: `scripts/fuzz`."""
