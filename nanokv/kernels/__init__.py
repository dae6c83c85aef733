"""Pure functions on tensors. An op has up to three implementations with one signature; `ops.Ops` selects one."""
