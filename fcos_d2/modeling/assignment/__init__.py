"""Which location learns which box: what all rules share, and one rule a file."""
