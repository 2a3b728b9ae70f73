"""Tables of cells: which there are, what each comes to, and how they are shown."""
