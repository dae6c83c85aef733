"""Codecs measured beside the main ones: no kernel reads their codes, so pages are decoded for each step."""
