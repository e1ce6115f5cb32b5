"""Other libraries on this package's kernels."""
