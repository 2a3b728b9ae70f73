"""What a run is to a person: the words that asked for it, its folder, its state, its name, a sweep of them."""
