"""Trains a dense MLA transformer, its lightning indexer, and both through the selection."""
