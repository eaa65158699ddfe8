"""Measures of a trained model: held-out losses, dense and sparse, and the attention mass that is kept."""
