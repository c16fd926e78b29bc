"""The experiments of the paper (DIP, arXiv 2504.14145), one module each with a function ``run``.

``benchmarks/paper_experiments.py`` runs them.
"""
