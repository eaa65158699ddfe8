"""Small programs over `train`, each with its settings and a recorded report."""
