"""Public benchmarks, one a file."""
