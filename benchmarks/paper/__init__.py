"""The experiments of the paper (DIP, arXiv 2504.14145), repeated in the simulator.

    python -m benchmarks.paper NAME [--quick] [--output FOLDER]

Every experiment is a module here with a function ``run``; ``docs/paper_experiments.md`` shows what
they found beside what was published.
"""
