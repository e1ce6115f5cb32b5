"""What makes this package's kernels serve other libraries' models. Nothing here imports those libraries when it is loaded."""
