"""The embedded language model: its corpus, tokens, net, training and generation. It knows no trace."""
