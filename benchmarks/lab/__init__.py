"""What the benchmarks of downloading stand on: a meter for whole commands, pictures, a web server, venvs, reports."""
