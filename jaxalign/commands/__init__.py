"""The `jaxalign` command: argparse, pages, benchmarks, synthesis and the quickstart."""
