"""Pallas kernels for NVIDIA Hopper (sm_90), a folder an operation, and the choice between them and plain XLA."""
