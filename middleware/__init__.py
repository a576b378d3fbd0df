"""The built-in middlewares. Each knows the contracts, the errors and the regions, and no other."""
