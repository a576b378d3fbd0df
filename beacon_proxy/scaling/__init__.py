"""How many workers a provider should keep, told to it where `autoscale` says so."""
