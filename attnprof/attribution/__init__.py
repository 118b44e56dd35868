"""Turn recorded facts into meaning: category, layer, phase and step of every block; pure."""

from attnprof.attribution.attribute import Attribution, attribute

__all__ = ["Attribution", "attribute"]
