"""``protoclip cluster``: which pictures, or rows of features, belong together."""
