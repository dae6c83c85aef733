"""Imported before torch by scripts that measure: bounds the spins of OpenMP threads, as the command line does."""

from nanokv.core.spin import bound_spins

bound_spins()
