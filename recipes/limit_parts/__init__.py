"""Parts of bench_information_limit.py."""
