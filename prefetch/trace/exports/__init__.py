"""A trace in the formats of others: one file per format; each says what it cannot hold."""
