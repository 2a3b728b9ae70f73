"""The model card of a model that any machine computes in moments, as a file holds it."""

CARD = """
_target_: prefetch.models.cards.model_card
name: small
published_parameters: 1
expert_precision: fp32
matrix_precision: fp32
rest_precision: fp32
hidden_size: 32
vocab_size: 100
layers: 4
attention: {kind: grouped, heads: 2, kv_heads: 2, head_dim: 16}
n_experts: 8
top_k: 2
expert_size: 16
score_function: softmax
weights_normalised: true
"""
