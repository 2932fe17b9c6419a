"""Benchmarks: each a module with ``main()``; ``python -m benchmarks`` lists and runs them."""
