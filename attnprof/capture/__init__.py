"""Watch a running program and write down facts; the only package that imports torch."""
