"""What a trained model is measured by: held-out losses, dense and sparse, and the attention mass that is kept."""
