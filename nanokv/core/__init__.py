"""Types that every package uses: configuration, requests, batches, memory specs, events, errors. Imports no package."""
