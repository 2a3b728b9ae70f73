"""What routing says: each file turns a trace into tables, over batches of any size."""
