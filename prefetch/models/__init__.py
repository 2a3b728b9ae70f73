"""What a MoE model looks like from outside: its sizes, and where its routers are."""
