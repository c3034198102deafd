"""The parts of the pursuits' benchmark, one module each; `benchmarks/pursuit.py` runs them."""
