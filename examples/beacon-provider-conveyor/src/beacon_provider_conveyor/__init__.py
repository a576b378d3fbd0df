"""The job service Conveyor as a provider of beacon-proxy."""
