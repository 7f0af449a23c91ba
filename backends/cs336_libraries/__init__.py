"""Good libraries of the field behind the same contracts: one module each, one backend each, thin.

A module holds the manifest of its backend and the adapter, and imports the library when the adapter is used. What a
library can't do is left unclaimed, or shows as failed checks in the grid: an adapter mends nothing.
"""
