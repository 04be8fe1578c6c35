"""A balanced subset of features: clusters of clusters, and a sample with equal shares of them."""
