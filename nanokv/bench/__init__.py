"""Workloads, measuring, reports and figures of `nanokv bench`."""
