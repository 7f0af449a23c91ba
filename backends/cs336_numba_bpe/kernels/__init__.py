"""The compiled part: numba source of every kernel. Imported only to compile; running needs the object code alone."""
