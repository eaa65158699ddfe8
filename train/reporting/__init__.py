"""The report of a finished run: results, figures and the text."""
