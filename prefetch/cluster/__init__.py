"""Shards of work, mapped over the workers of a Dask cluster."""
