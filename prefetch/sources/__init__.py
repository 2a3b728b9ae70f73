"""Where a trace comes from: one file per source, and the stage `collect`."""
