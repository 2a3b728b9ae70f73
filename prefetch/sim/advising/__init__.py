"""What to do on one's own machine: the ways, what guesses win, the page."""
