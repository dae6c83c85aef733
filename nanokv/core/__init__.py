"""The words every room uses: configuration, requests, memory specs, batches, events, errors."""
