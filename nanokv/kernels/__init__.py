"""Pure functions on tensors, each op written up to three times under one signature; `ops` picks the twin."""
