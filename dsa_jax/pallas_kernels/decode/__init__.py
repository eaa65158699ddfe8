"""Decodes over paged caches: index scores, exact top-k and the write of new entries."""
