"""What a profiler saw, as tables: each file knows one question about a profile, and none knows a stage."""
