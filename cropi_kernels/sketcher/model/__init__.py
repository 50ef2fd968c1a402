"""What a model is: what its modules compute, on which ranks its weights are, and how it is run unchanged."""
