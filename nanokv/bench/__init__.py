"""Workloads, measurements, reports and figures of `nanokv bench`; the bytes that `nanokv size` prints."""
