"""The smallest provider and a small middleware for beacon-proxy."""
