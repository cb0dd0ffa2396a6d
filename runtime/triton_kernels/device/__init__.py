"""Code that Triton compiles: no types, constants in capitals, and no statement behind a branch that returned."""
