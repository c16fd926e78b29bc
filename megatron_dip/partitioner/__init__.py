"""The choice of a cut: segments and layers per rank, tried by planning whole batches."""
