"""The demo: a small model learns to recall values stated far back, and its indexer to find them; minutes on a CPU.

`python -m studies.tiny` trains and reports, `python -m studies.tiny.report FOLDER` writes a report again. The recorded
report of three seeds is in benchmarks/results/tiny.
"""
