"""What the simulator says beforehand, and what the engine then takes: side by side, cell by cell."""
