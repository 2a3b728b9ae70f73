"""Between which results every policy and every predictor lies."""
