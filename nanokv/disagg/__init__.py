"""Prefill here, decode there: two processes, one pool of pages."""
