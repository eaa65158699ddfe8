"""The study of needles: a dense model of long text is made sparse, and asked for what it read far back."""
