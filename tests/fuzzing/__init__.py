"""Hostile files for every reader: how they are made, which readers there are, and what is watched while one reads."""
