"""What a run looks like: an HTML page about one or several runs."""
