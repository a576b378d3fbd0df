"""Alerts: what is watched, when an alert begins and ends, and who is told."""
