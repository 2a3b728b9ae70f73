"""What a guess is worth: hardware, policies, the replay engines, and the bounds."""
