"""The built-in providers: what is particular to each family of GPU servers.

Found through the entry points of this package, like a stranger's. `openai` also holds, as plain
functions, what its siblings share with it.
"""
