"""What routing is, and what a guess is: schema, Parquet store, predictions file, integrity checks."""
