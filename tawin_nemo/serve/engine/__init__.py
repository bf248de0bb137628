"""One engine behind the server: admission, batching, versions of weights and catalog, and its ranks."""
