"""Benchmarks that refuse to print the speed of a wrong result.

`runner.py` starts a fresh process per backend (`worker.py`), which must pass the contract's checks before it may be
timed; rounds are interleaved; `roofline.py` measures the machine's limits in the same run; `rows.py` appends the
results; `report.py` draws them and `tables.py` renders the README's.
"""
