"""Optimizers of other systems under their own names, in functional form."""
