"""Tools of all measurements: cases, ceilings, timing, reports."""
