"""Mixture-of-Experts layers over a pool of expert slots: every operation as a torch definition and a Triton twin.

The definitions are the documentation, the oracle and the path of a CPU; nothing here needs triton before a tensor on a
GPU (or `TRITON_INTERPRET=1`) asks for it. It knows no model, no cache policy and no copies.
T tokens, K choices, R = T*K rows, E experts, S slots, N elements of a block, D hidden, F inner, G = 2F, B tiles.
"""
