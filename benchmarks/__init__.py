"""Benchmarks: one file a table of the performance page; they time, they never define."""
