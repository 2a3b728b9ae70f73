"""What guesses come to: who is scored on what, counts, rates with intervals, tables and figures."""
