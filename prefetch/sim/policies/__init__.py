"""Who leaves a cache: one file per idea."""
