"""The processes of a run and how they end: the cluster, signals, the lock on a folder, the last line."""
