"""What a finished run is told as: results, figures and the report."""
