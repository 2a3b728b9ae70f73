"""What `stage=profile` is made of: a grid of layers, their operations, clocks, roofs, copies, and what is said of them.

It decides nothing about caches and simulates nothing.
T tokens, E experts, K choices, R = T*K rows, D hidden, F inner, G = 2F, N elements of an expert's block, C seats.
"""
