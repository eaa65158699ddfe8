"""The study of Native Sparse Attention beside DSA: the same data, tokens and questions for every attention."""
