"""What a replay is, in plain Python and compiled: events through caches, with and without a clock."""
