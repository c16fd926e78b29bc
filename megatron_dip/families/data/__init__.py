"""Samples, files, indexes and tokenizers: what the data sets of several families share."""
