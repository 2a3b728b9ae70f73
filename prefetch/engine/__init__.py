"""The simulator's decisions on a real device: a pool of slots, copies on a stream of their own, experts that wait."""
