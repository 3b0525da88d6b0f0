"""The recipe: schema, loading, checks; no torch."""
