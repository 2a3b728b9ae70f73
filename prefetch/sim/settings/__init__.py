"""What to type in the engines that people use, for a placement of experts: one file per engine."""
