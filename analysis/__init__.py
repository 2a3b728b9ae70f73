"""What routing says: every analysis is a table from a trace. It stands above `prefetch`; nothing there imports it."""
