"""Generators of small data sets: what the quickstart and the tests train on."""
