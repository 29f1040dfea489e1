"""A simulation in virtual time, with real gates and controllers; imports no torch."""
