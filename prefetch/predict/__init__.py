"""Who guesses the next experts: one file per idea, and one place that says what a guess may know."""
