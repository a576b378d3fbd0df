"""What the proxy remembers and tells: the canonical log line, metrics, the last hour."""
