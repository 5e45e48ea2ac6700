"""HTTP to contract, and back."""
